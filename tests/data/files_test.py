"""What a user writes becomes the files that a shell would see, by the names they were found under."""

import errno
import gzip
import os

import fsspec
import pytest

from mc_jax.data import DataConfig, datasets, files, formats, sources
from mc_jax.data.documents import Documents
from mc_jax.data.tokenizers import Bytes
from mc_jax.errors import ConfigError


def _write(root, *names):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(name.encode(errors="replace"))


def _windows(paths):
  return list(sources.text(paths))


def _packed(paths):
  return [block.name for block in formats.blocks(DataConfig(source="text", paths=paths))]


@pytest.fixture(params=[_windows, _packed, files.find], ids=["windows", "packed", "find"])
def names(request):
  """(paths) -> names of their files, as windows, packing and everything else see them."""
  return lambda paths: list(request.param(str(paths)))


def test_links_to_folders_are_followed_under_their_own_name(tmp_path, names):
  _write(tmp_path, "real/1.txt", "real/deep/2.txt", "corpus/0.txt")
  (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "real")
  expected = ["0.txt", "linked/1.txt", "linked/deep/2.txt"]
  for paths in ("corpus", "corpus/**", "corpus/**/*.txt", "corpus/*.txt,{root}/corpus/*/**/*.txt"):
    assert names(f"{tmp_path}/{paths}".format(root=tmp_path)) == expected


def test_a_link_to_a_folder_above_it_ends_and_one_to_its_neighbour_does_not(tmp_path, names):
  _write(tmp_path, "a/1.txt", "b/2.txt")
  (tmp_path / "a" / "up").symlink_to(tmp_path)
  (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
  expected = ["a/1.txt", "b/2.txt", "b/a/1.txt"]
  assert names(tmp_path) == names(f"{tmp_path}/**/*.txt") == expected


def test_a_link_into_a_cache_keeps_its_name_and_its_suffix(tmp_path, names):
  (tmp_path / "blobs").mkdir()
  (tmp_path / "blobs" / "0a1b2c").write_bytes(gzip.compress(b'{"text": "one"}\n'))
  (tmp_path / "snapshot").mkdir()
  (tmp_path / "snapshot" / "data.jsonl.gz").symlink_to("../blobs/0a1b2c")
  assert names(tmp_path / "snapshot") == ["data.jsonl.gz"]
  for paths in ("snapshot", "snapshot/*.gz", "snapshot/data.jsonl.gz"):
    documents = Documents(formats.blocks(DataConfig(source="jsonl", paths=str(tmp_path / paths))), Bytes())
    assert [documents.text(i) for i in range(len(documents))] == ["one"]
  assert sources.text(str(tmp_path / "snapshot")) == {"data.jsonl.gz": b'{"text": "one"}\n'}


def test_hidden_files_and_folders_are_left_out_unless_named(tmp_path, names):
  _write(tmp_path, "a.txt", ".b.txt", ".git/c.txt", "d/.e/f.txt", "d/g.txt")
  assert names(tmp_path) == names(f"{tmp_path}/**/*.txt") == names(f"{tmp_path}/**") == ["a.txt", "d/g.txt"]
  assert names(f"{tmp_path}/*.txt") == ["a.txt"]
  assert names(f"{tmp_path}/.*.txt") == names(f"{tmp_path}/.b.txt") == [".b.txt"]
  assert names(f"{tmp_path}/.git") == ["c.txt"]


def test_a_home_folder_is_expanded(tmp_path, names, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  _write(tmp_path, "corpus/a.txt", "corpus/b.txt")
  assert names("~/corpus") == names("~/corpus/*.txt") == ["a.txt", "b.txt"]


def test_a_file_given_twice_counts_once(tmp_path, names, monkeypatch):
  monkeypatch.chdir(tmp_path)
  _write(tmp_path, "c/a.txt", "c/b.txt")
  assert names(f"c/a.txt, ./c/a.txt,c//a.txt,{tmp_path}/c/a.txt,c/../c/a.txt,c,c/*.txt,") == ["a.txt", "b.txt"]


def test_a_way_up_starts_from_where_a_link_leads(tmp_path, names):
  _write(tmp_path, "far/away/a.txt", "far/b.txt", "b.txt")
  (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
  assert files.matches(f"{tmp_path}/link/../b.txt") == [f"{tmp_path}/far/b.txt"]
  assert names(f"{tmp_path}/link/../b.txt") == ["b.txt"]


@pytest.mark.parametrize("name", ["a,b.txt", "a, b,c.txt", "data[1].txt", "q?.txt", "x*.txt", "a::b.txt", "c#d.txt"])
def test_what_exists_as_it_is_written_is_that_file(tmp_path, names, name):
  _write(tmp_path, f"f[0]/{name}", "f[0]/data1.txt", "f[0]/qq.txt", "f[0]/xx.txt", "f0/other.txt")
  assert names(f"{tmp_path}/f[0]/{name}") == [name]
  assert names(f"{tmp_path}/f[0]/xx.txt,{tmp_path}/f[0]/{name}") == sorted(["xx.txt", name])
  assert len(names(f"{tmp_path}/f[0]/*.txt")) == 4


def test_a_link_that_leads_nowhere_is_named(tmp_path, names):
  _write(tmp_path, "c/a.txt")
  (tmp_path / "c" / "gone.txt").symlink_to("missing.txt")
  for paths in ("c", "c/*", "c/gone.txt", "**/*.txt"):
    with pytest.raises(ConfigError, match=r"the link .*c/gone\.txt leads nowhere \(to missing\.txt\)"):
      names(tmp_path / paths)
  (tmp_path / "c" / "gone.txt").unlink()
  (tmp_path / "c" / "self").symlink_to("self")
  with pytest.raises(ConfigError, match=r"c/self leads nowhere"):
    names(tmp_path)


def test_what_matches_nothing_is_named_with_what_would_help(tmp_path, names, monkeypatch):
  monkeypatch.chdir(tmp_path)
  _write(tmp_path, "a.txt")
  with pytest.raises(ConfigError, match=rf"no file matches 'c/\*\.txt'; relative paths are read from {tmp_path}: "):
    names("a.txt,c/*.txt,d")
  with pytest.raises(ConfigError, match=rf"no file matches '{tmp_path}/c'$"):
    names(f"{tmp_path}/c")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ConfigError, match="no file matches 'empty': its folders hold none"):
    names("a.txt,empty")


def test_other_file_systems_are_read_as_this_one(names):
  memory = fsspec.filesystem("memory")
  for name in ("a.txt", "d/b.txt", ".c.txt", "d/.e/f.txt"):
    memory.pipe(f"/shelf/{name}", name.encode())
  expected = ["a.txt", "d/b.txt"]
  assert names("memory://shelf") == names("memory://shelf/**") == names("memory://shelf/**/*.txt") == expected
  with pytest.raises(ConfigError, match="no file matches 'memory://nothing'"):
    names("memory://nothing")


def test_names_of_files_on_several_file_systems_are_told_apart(tmp_path, names):
  fsspec.filesystem("memory").pipe("/rack/a.txt", b"there")
  _write(tmp_path, "a.txt", "b.txt")
  assert names(f"memory://rack,file://{tmp_path}/a.txt,{tmp_path}/b.txt") == sorted(
    [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt", "memory:///rack/a.txt"]
  )


def test_a_name_that_is_not_utf8_is_a_name(tmp_path, names):
  name = os.fsdecode(b"caf\xe9.txt")
  _write(tmp_path, name)
  assert names(tmp_path) == [name]
  assert sources.held_out(name, 1.0, 0)


def test_special_files_are_left_out(tmp_path, names):
  _write(tmp_path, "a.txt")
  os.mkfifo(tmp_path / "b.txt")
  assert names(tmp_path) == ["a.txt"]


def test_a_byte_order_mark_is_not_text(tmp_path):
  for i in range(20):
    (tmp_path / f"{i}.txt").write_bytes(b"\xef\xbb\xbfone\xef\xbb\xbf")
  config = DataConfig(source="text", paths=str(tmp_path), validation_fraction=0.3)
  documents = Documents(formats.blocks(config), Bytes())
  assert {documents.text(i) for i in range(20)} == {"one\ufeff"}
  corpus = sources.load(config)
  assert set(corpus.training.tobytes().split(b"\0")[1:]) == {b"one\xef\xbb\xbf"}


def test_the_prose_of_niah_is_found_and_read_alike(tmp_path, monkeypatch):
  _write(tmp_path, "real/a.txt", "c/b.txt")
  (tmp_path / "real" / "a.txt").write_bytes(b"\xef\xbb\xbfone two")
  (tmp_path / "c" / "link").symlink_to(tmp_path / "real")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert list(datasets._texts("~/c")) == [b"c/b.txt", b"one two"]


def test_a_file_that_is_not_text_stops_or_is_left_out_either_way(tmp_path, caplog):
  _write(tmp_path, "a.txt", "b.txt")
  (tmp_path / "bad.txt").write_bytes("text".encode("utf-16"))
  documents = Documents(formats.blocks(DataConfig(source="text", paths=str(tmp_path))), Bytes(), "skip")
  assert [documents.text(i) for i in range(3)] == ["a.txt", "b.txt", None]
  assert list(sources.text(str(tmp_path), "skip")) == ["a.txt", "b.txt"]
  assert caplog.text.count("bad.txt is UTF-16, not UTF-8: convert it") == 2
  with pytest.raises(ConfigError, match=r"bad\.txt is UTF-16.*on_error=skip"):
    sources.text(str(tmp_path))


@pytest.mark.parametrize(("number", "raised"), [(errno.EIO, OSError), (errno.ENOENT, ConfigError)])
def test_a_failing_disk_is_not_bad_input(tmp_path, number, raised):
  _write(tmp_path, "a.txt")
  with pytest.raises(raised, match=r"cannot read .*a\.txt") as caught, files.reading(str(tmp_path / "a.txt")):
    raise OSError(number, os.strerror(number))
  assert isinstance(caught.value, ConfigError) == (raised is ConfigError)
