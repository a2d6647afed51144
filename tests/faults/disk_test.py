"""A disk that is full, or fills up, leaves the last good checkpoint, and says so."""

import collections
import dataclasses
import shutil
import subprocess

import jax
import pytest
from etils import epath

from mc_jax import storage
from mc_jax.data import datasets
from mc_jax.training import loop, state
from mc_jax.training.checkpointing import Checkpoints

ONE = jax.devices()[:1]
Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def config(tiny):
  return tiny(pattern="attention", steps=9)


@pytest.fixture
def small_disk(tmp_path):
  """A file system of a megabyte."""
  folder = tmp_path / "disk"
  folder.mkdir()
  done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False)
  if done.returncode:
    pytest.skip("mounting a file system is not allowed here")
  yield folder
  subprocess.run(["umount", folder], check=True)


def _save(checkpoints, steps, config, alone):
  current, data = state.create(config, alone), datasets.load(config.data).batches(alone)
  for step in steps:
    checkpoints.save(step, current, data, config)


def _newest(workdir):
  with Checkpoints(workdir, keep=2) as checkpoints:
    return checkpoints.latest()


@pytest.mark.slow
def test_a_file_that_cannot_be_written_leaves_the_one_before(forks, tiny, tmp_path):
  """The operating system refuses files of more than 100 kB, as a full disk does in the middle of one."""
  # A single array is larger than that: how many arrays go into a file is a matter of timing.
  large = tiny(pattern="attention", steps=6, d_model=32, mlp_dim=2048)
  short = dataclasses.replace(large, train=dataclasses.replace(large.train, steps=3))
  loop.train(short, tmp_path, devices=ONE)
  forks.start(large, tmp_path, largest_file=100_000)
  status, printed = forks.finish()
  assert status == 1
  assert f"a checkpoint could not be written to {tmp_path / 'checkpoints'}; the newest is that of step 3. " in printed
  assert "File too large" in printed
  assert _newest(epath.Path(tmp_path)) == 3


def test_a_disk_that_fills_up_leaves_the_one_before(small_disk, config, alone):
  workdir = epath.Path(small_disk)
  with pytest.raises(OSError, match=r"the newest is that of step 3"), Checkpoints(workdir, keep=2) as checkpoints:
    _save(checkpoints, [3], config, alone)
    checkpoints.wait()
    room = shutil.disk_usage(workdir).free
    (workdir / "other").write_bytes(b"0" * max(0, room - 120_000))  # more than the state, less than its files
    checkpoints.require_space = lambda _: None
    _save(checkpoints, [6], config, alone)
  (workdir / "other").unlink()
  assert _newest(workdir) == 3


def test_room_is_looked_for_before_a_checkpoint_is_written(tmp_path, config, monkeypatch):
  room = iter([2**40, 2**40, 1000])  # at the start, for step 3, for step 6
  monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, next(room)))
  with pytest.raises(OSError, match=r"room for 0\.0 MiB, and a checkpoint takes 0\.\d MiB; the newest .* step 3"):
    loop.train(config, tmp_path, devices=ONE)
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
  assert storage.damage(epath.Path(tmp_path / "checkpoints" / "3")) == []


def test_a_run_without_room_for_a_checkpoint_does_not_start(tmp_path, config, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, 0))
  with pytest.raises(OSError, match=r"; there is none yet"):
    loop.train(config, tmp_path, devices=ONE)
