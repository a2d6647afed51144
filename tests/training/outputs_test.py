"""A run's files in a bucket: a file system in memory stands for it."""

import importlib.util
import os

import fsspec
import jax
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from mc_jax.data import lock
from mc_jax.errors import ConfigError
from mc_jax.training import loop, metrics, outputs, profiling
from mc_jax.training.checkpointing import Checkpoints
from mc_jax.training.progress import Progress


class Bucket(MemoryFileSystem):
  """Like the real ones, it appends to nothing."""

  protocol = ("gs", "gcs")
  store: dict = {}  # noqa: RUF012  as MemoryFileSystem has it, for all instances
  pseudo_dirs = [""]  # noqa: RUF012

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.removeprefix("gs://"))

  def _open(self, path, mode="rb", **options):
    assert "a" not in mode
    return super()._open(path, mode, **options)


@pytest.fixture
def bucket(monkeypatch):
  monkeypatch.setattr(Bucket, "store", {})
  monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
  for scheme in Bucket.protocol:
    fsspec.register_implementation(scheme, Bucket, clobber=True)
  return epath.Path("gs://bucket/runs")


def test_only_what_changed_is_sent_and_folders_are_kept(bucket):
  with outputs.outputs(bucket) as files:
    (files.folder / "a").write_text("1")
    (files.folder / "deep").mkdir()
    (files.folder / "deep" / "b").write_text("2")
    files.send()
    assert (bucket / "a").read_text() == "1"
    (bucket / "a").unlink()
    (files.folder / "deep" / "b").write_text("23")
  assert not (bucket / "a").exists()
  assert (bucket / "deep" / "b").read_text() == "23"
  assert not files.folder.exists()


def test_a_folder_of_this_machine_is_written_directly(tmp_path):
  with outputs.outputs(epath.Path(tmp_path)) as files:
    assert files.folder == tmp_path
    files.fetch("metrics.jsonl")
    files.send()
  assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_not_the_first_leaves_its_traces_and_nothing_else(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with outputs.outputs(epath.Path(tmp_path)) as files:
    (files.folder / "a").write_text("1")
  assert list(tmp_path.iterdir()) == []
  of_the_first = tmp_path / profiling.FOLDER / "host.xplane.pb"  # of the same host
  of_the_first.parent.mkdir()
  of_the_first.write_text("0")
  with outputs.outputs(epath.Path(tmp_path)) as files:
    (files.folder / profiling.FOLDER).mkdir()
    (files.folder / profiling.FOLDER / of_the_first.name).write_text("1")
  assert of_the_first.read_text() == "0"
  assert of_the_first.with_name("process_1_host.xplane.pb").read_text() == "1"
  assert [path.name for path in tmp_path.iterdir()] == [profiling.FOLDER]


class Killed(BaseException):
  """Stands for a kill, after which nothing is sent any more."""


def test_a_killed_run_goes_on_with_the_records_in_the_bucket(tiny, bucket, tmp_path, monkeypatch):
  """Orbax has its own way to buckets, so the checkpoints are in a folder here."""
  monkeypatch.setattr(loop, "Checkpoints", lambda _, *kept: Checkpoints(epath.Path(tmp_path), *kept))
  config, report, send = tiny(pattern="attention", sample_length=2), Progress.report, outputs.Outputs.send

  def killing(self, record):
    report(self, record)
    if record["step"] == 5:
      monkeypatch.setattr(outputs.Outputs, "send", lambda self: None)
      raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(Progress, "report", killing)
    with pytest.raises(Killed):
      loop.train(config, bucket, devices=jax.devices()[:1])
  monkeypatch.setattr(outputs.Outputs, "send", send)
  assert [record["step"] for record in metrics.read(bucket)] == [1, 2, 3]
  loop.train(config, bucket, devices=jax.devices()[:1])
  assert [record["step"] for record in metrics.read(bucket)] == [1, 2, 3, 4, 5, 6]
  names = {"config.json", "metrics.jsonl", "tensorboard", "loss.png", "report.txt", "sample.txt"}
  assert {path.name for path in bucket.iterdir()} == names
  assert "gs://bucket/runs/loss.png" in (bucket / "report.txt").read_text()


def test_one_run_has_a_bucket_s_folder_and_a_dead_one_gives_it_back(bucket, monkeypatch):
  monkeypatch.setattr(lock, "_BEAT", 0.1)
  monkeypatch.setattr(lock, "_SILENCE", 0.5)
  with outputs.occupied(bucket):
    with (
      pytest.raises(OSError, match=rf"another process trains in {bucket}: pid {os.getpid()} on "),
      outputs.occupied(bucket),
    ):
      pass
    assert (bucket / "lock").exists()
  assert not (bucket / "lock").exists()
  (bucket / "lock").write_text('{"host": "gone", "pid": 1, "since": "2026-01-01"}')
  with outputs.occupied(bucket):
    pass
  assert not (bucket / "lock").exists()


@pytest.mark.parametrize("text", ["notes.txt", "notes.txt/run"])
def test_a_file_is_no_workdir(tmp_path, monkeypatch, text):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ConfigError, match=rf"--workdir={text} must be a folder, and notes.txt is a file"):
    outputs.workdir(text)


def test_a_workdir_is_read_as_it_was_typed(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert outputs.workdir("~/run") == tmp_path / "run"
  with pytest.raises(ConfigError, match=r"--workdir='runs/.udce6' is not UTF-8"):
    outputs.workdir("runs/\udce6")


def test_other_places_and_a_missing_package_are_named(monkeypatch):
  assert str(outputs.workdir("runs/x")) == "runs/x"
  with pytest.raises(ConfigError, match=r"--workdir must be a folder of this machine or gs://.*, got s3://b/x"):
    outputs.workdir("s3://b/x")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"needs the package gcsfs: pip install -e '.\[gcs\]'"):
    outputs.workdir("gs://b/x")
