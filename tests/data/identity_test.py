"""What a run was trained on is known again, and what differs is named."""

import dataclasses
import shutil

import numpy as np
import pytest
import written

from mc_jax.data import DataConfig, PackingConfig, datasets, identity, preparation
from mc_jax.data.config import SourceConfig
from mc_jax.data.identity import Identity
from mc_jax.errors import ConfigError


def _load(source, paths, method="concat", **fields):
  return datasets.load(
    DataConfig(
      source=source, paths=str(paths), length=32, packing=PackingConfig(method), validation_fraction=0.3, **fields
    )
  ).identity


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "arrayrecord"])
def test_the_same_files_elsewhere_are_the_same_data(corpora, tmp_path, source):
  there = shutil.copytree(corpora[source], tmp_path / "moved")
  here = _load(source, corpora[source])
  assert here == _load(source, there)
  assert here.tokenizer == "bytes"
  assert identity.resumed(here, _load(source, there), allow_growth=False) == []
  assert all(len(digest) == 16 for digest in here.files[source].values())


def test_windows_and_packed_rows_of_text_know_their_files_alike(corpora):
  assert _load("text", corpora["text"]) == _load("text", corpora["text"], "windows")


def _rewritten(path, texts):
  name = path.name
  if name.endswith(".txt"):
    path.write_text(path.read_text()[::-1])  # as many bytes
  elif name.endswith(".parquet"):
    written.parquet(path, texts)
  elif name.endswith(".array_record"):
    written.array_record(path, [text.encode() for text in texts])
  elif name.endswith(".zst"):
    path.write_bytes(written.zstd(written.lines(texts)))


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "arrayrecord"])
def test_other_contents_under_the_same_name_are_noticed(corpora, texts, tmp_path, source):
  """As many documents of the same lengths, in as many bytes where nothing is compressed."""
  folder = shutil.copytree(corpora[source], tmp_path / "copy")
  then = _load(source, folder)
  changed = sorted(folder.iterdir())[-1]
  _rewritten(changed, [text.swapcase() for text in texts[25:]])
  with pytest.raises(ConfigError, match=f"{source}: 1 of .* files has other contents: {changed.name}"):
    identity.resumed(then, _load(source, folder), allow_growth=True)


def test_folders_of_ids_are_known_by_their_order(corpora, tmp_path):
  for name in ("a", "b"):
    paths = str(corpora["jsonl"] / f"{name}.*")
    preparation.prepare(SourceConfig(source="jsonl", paths=paths), str(tmp_path / name), "bytes", shards=1)
  one = _load("tokens", tmp_path / "a")
  both, swapped = (_load("tokens", f"{tmp_path}/{x},{tmp_path}/{y}") for x, y in ("ab", "ba"))
  assert list(both.files["tokens"]) == [
    "tokens-00000-of-00001.array_record",
    "tokens-00000-of-00001.array_record (2)",
  ]
  assert identity.resumed(one, both, allow_growth=True)
  with pytest.raises(ConfigError, match="2 of 2 files have other contents"):
    identity.resumed(both, swapped, allow_growth=True)


THEN = Identity("abc/0", {"books": {"a": "1", "b": "2", "c": "3"}, "web": {"x": "9"}})


def _with(files, tokenizer="abc/0"):
  return Identity(tokenizer, {"books": files, "web": {"x": "9"}})


@pytest.mark.parametrize(
  ("now", "message"),
  [
    (_with({"a": "1", "c": "3"}), "books: 1 of 3 files is gone: b"),
    (_with({"a": "1", "b": "0", "c": "0", "d": "4"}), "books: 2 of 3 files have other contents: b, c"),
    (_with({"b": "2", "a": "1", "c": "3"}), "books: the files are read in another order"),
    (_with({"u/a": "1", "u/b": "2", "u/c": "3", "v/d": "4"}), "books: 3 of 3 files have other names, such as a"),
    (_with(THEN.files["books"], "abd/0"), "another fingerprint: abc/0 then, abd/0 now"),
    (_with(THEN.files["books"], "abc/1"), "another fingerprint: abc/0 then, abc/1 now"),
    (_with(THEN.files["books"], None), "another fingerprint: abc/0 then, none now"),
  ],
)
def test_what_is_not_as_it_was_is_refused_whatever_is_allowed(now, message):
  with pytest.raises(ConfigError) as raised:
    identity.resumed(THEN, now, allow_growth=True)
  assert message in str(raised.value)
  assert "another --workdir" in str(raised.value)


def test_a_second_copy_of_a_file_that_is_gone_is_no_other_name():
  then, now = _with({"a": "1", "copy": "1"}), _with({"a": "1"})
  with pytest.raises(ConfigError, match="books: 1 of 2 files is gone: copy"):
    identity.resumed(then, now, allow_growth=False)


def test_what_has_grown_is_allowed_when_asked_for():
  files = {name: str(name) for name in "defghi"}
  grown = _with({**THEN.files["books"], **files})
  with pytest.raises(ConfigError, match=r": books has 6 new files \(d, e, f, g and 2 more\).*allow_growth=True"):
    identity.resumed(THEN, grown, allow_growth=False)
  (line,) = identity.resumed(THEN, grown, allow_growth=True)
  assert "cannot be compared with earlier ones" in line
  assert identity.resumed(THEN, dataclasses.replace(THEN, files=THEN.files | {"new": {"y": "1"}}), False) == []


def test_what_is_unknown_is_said():
  (line,) = identity.resumed(None, THEN, allow_growth=False)
  assert "cannot be compared" in line
  identity.require_tokenizer(None, "abc/0", "x.json")
  identity.require_tokenizer(THEN, None, "x.json")
  with pytest.raises(
    ConfigError, match=r"data\.tokenizer=x\.json is not the tokenizer that the model was trained with"
  ):
    identity.require_tokenizer(THEN, "abd/0", "x.json")


def test_streams_are_told_apart_by_file():
  stream = np.frombuffer(b"\0one\0\0three", np.uint8)
  found = identity.of_stream(["a", "b", "c"], stream)
  assert list(found) == ["a", "b", "c"]
  assert found["a"] == identity.of_stream(["x"], stream[:4])["x"]
  assert len(set(found.values())) == 3
