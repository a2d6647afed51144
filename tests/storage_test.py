"""Files are whole or as they were, and a name that a user wrote is a path of this machine or of a bucket."""

import threading

import pytest
from etils import epath

from mc_jax import storage


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
  storage.write(tmp_path / "a", "€")
  owner = type(epath.Path(tmp_path))

  def fail(*_):
    raise OSError("killed")

  monkeypatch.setattr(owner, failing, fail)
  with pytest.raises(OSError, match="killed"):
    storage.write(tmp_path / "a", "$")
  assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {"a": "€"}


def test_names_that_no_locale_can_read_are_written_as_escapes(tmp_path):
  storage.write(tmp_path / "a", "\udce6")
  assert (tmp_path / "a").read_bytes() == rb"\udce6"


def test_two_that_write_one_file_at_once_do_not_mix(tmp_path):
  contents = [bytes([n]) * 100_000 for n in range(4)]

  def write(content):
    for _ in range(20):
      storage.write(tmp_path / "a", content)
      assert (tmp_path / "a").read_bytes() in contents

  threads = [threading.Thread(target=write, args=(content,)) for content in contents]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [path.name for path in tmp_path.iterdir()] == ["a"]
  assert (tmp_path / "a").read_bytes() in contents


def test_names_are_paths_of_this_machine_or_of_a_bucket(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  monkeypatch.chdir("/")
  assert str(storage.path("~/a")) == "/home/me/a"
  assert str(storage.absolute("a")) == "/a"
  assert not storage.in_bucket(storage.path("~/a"))
  for bucket in ("gs://bucket/~/a", "s3://bucket/a"):
    assert storage.in_bucket(bucket)
    assert str(storage.absolute(bucket)) == bucket
