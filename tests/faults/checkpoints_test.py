"""Damage to the files of a checkpoint is found before anything of it is used."""

import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import pytest
from etils import epath

from mc_jax import storage
from mc_jax.data import datasets
from mc_jax.errors import ConfigError
from mc_jax.training import config as config_lib
from mc_jax.training import state
from mc_jax.training.checkpointing import Checkpoints

STEPS = (3, 6)


@pytest.fixture(scope="module")
def config(tiny):
  return tiny(pattern="attention")


@pytest.fixture(scope="module")
def states(config, alone):
  """What is in the checkpoints: {step: state}."""
  start = state.create(config, alone)
  return {step: jax.tree.map(lambda x, step=step: x + jnp.asarray(step, x.dtype), start) for step in STEPS}


@pytest.fixture(scope="module")
def saved(config, states, alone, tmp_path_factory):
  """A workdir with two checkpoints."""
  folder, data = tmp_path_factory.mktemp("saved"), datasets.load(config.data).batches(alone)
  with Checkpoints(epath.Path(folder), keep=2) as checkpoints:
    for step in STEPS:
      next(data)
      checkpoints.save(step, states[step], data, config)
  return folder


@pytest.fixture
def workdir(saved, tmp_path):
  return epath.Path(shutil.copytree(saved, tmp_path / "run"))


def _files(workdir, step):
  folder = workdir / "checkpoints" / str(step)
  return sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
  "flipped": _flip,
  "truncated": _truncate,
  "empty": lambda path: path.write_bytes(b""),
  "missing": pathlib.Path.unlink,
}


def _restore(workdir, config, alone):
  data = datasets.load(config.data).batches(alone)
  with Checkpoints(workdir, keep=2) as checkpoints:
    step = checkpoints.latest()
    assert config_lib.from_dict(checkpoints.config(step)) == config
    return step, checkpoints.restore(step, state.abstract(config, alone), data), data.position


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_of_the_newest_is_told_and_the_one_before_is_used(
  saved, tmp_path, config, states, alone, damage, capsys
):
  """Some 18 files, each damaged in four ways."""
  names = [path.relative_to(saved) for path in _files(saved, 6) if path.stat().st_size]
  assert len(names) >= 15
  for i, name in enumerate(names):
    workdir = epath.Path(shutil.copytree(saved, tmp_path / str(i)))
    DAMAGES[damage](pathlib.Path(workdir / name))
    with Checkpoints(workdir, keep=2) as checkpoints:
      assert checkpoints.latest() == 3, name
    printed = capsys.readouterr()
    assert f"the checkpoint of step 6 is not intact, it was moved to {workdir / 'damaged' / '6'}" in printed.out
    assert str(workdir / name) in printed.err or name.name == storage.DIGESTS
    assert (workdir / "damaged" / "6").is_dir()
  step, restored, position = _restore(workdir, config, alone)
  assert (step, position) == (3, config.data.batch_size)
  chex.assert_trees_all_equal(restored, states[3])


def test_an_intact_checkpoint_is_used(workdir, config, states, alone):
  step, restored, _ = _restore(workdir, config, alone)
  assert step == 6
  chex.assert_trees_all_equal(restored, states[6])


def test_without_an_intact_checkpoint_the_run_stops_and_nothing_is_changed(workdir):
  damaged = [max(_files(workdir, step), key=lambda path: path.stat().st_size) for step in STEPS]
  for path in damaged:
    _flip(path)
  before = {path: path.read_bytes() for step in STEPS for path in _files(workdir, step)}
  with pytest.raises(ConfigError) as raised:
    Checkpoints(workdir, keep=2)
  assert all(str(path) in str(raised.value) for path in damaged)
  assert "no intact checkpoint" in str(raised.value)
  assert {path: path.read_bytes() for step in STEPS for path in _files(workdir, step)} == before


def test_a_kill_between_commit_and_digests_leaves_the_one_before(workdir, capsys):
  (workdir / "checkpoints" / "6" / storage.DIGESTS).unlink()
  with Checkpoints(workdir, keep=2) as checkpoints:
    assert checkpoints.latest() == 3
  assert "was not complete when the run ended" in capsys.readouterr().err


def test_a_kill_before_the_first_digests_starts_over(workdir, config, states, alone):
  for step in STEPS:
    (workdir / "checkpoints" / str(step) / storage.DIGESTS).unlink()
  with Checkpoints(workdir, keep=2) as checkpoints:
    assert checkpoints.latest() is None
    checkpoints.save(6, states[6], datasets.load(config.data).batches(alone), config)
  assert _restore(workdir, config, alone)[0] == 6
  assert sorted(path.name for path in (workdir / "damaged").iterdir()) == ["3", "6"]


def test_what_a_kill_left_half_written_is_swept_away(workdir, config, states, alone):
  halves = [workdir / "checkpoints" / f"{step}.orbax-checkpoint-tmp" for step in (8, 9)]
  for half in halves:
    shutil.copytree(workdir / "checkpoints" / "6", half)
    (half / storage.DIGESTS).unlink()
  with Checkpoints(workdir, keep=2) as checkpoints:
    assert checkpoints.latest() == 6
    checkpoints.save(9, states[6], datasets.load(config.data).batches(alone), config)
  assert not any(half.exists() for half in halves)
  assert _restore(workdir, config, alone)[0] == 9


def test_a_file_more_and_a_name_that_leads_out_of_the_folder_are_damage(workdir):
  folder = workdir / "checkpoints" / "6"
  (folder / "state" / "more").write_text("?")
  (found,) = storage.damage(folder)
  assert f"{folder / 'state' / 'more'} is not among the files" in found
  (folder / "state" / "more").unlink()
  secret = workdir / "secret"
  secret.write_text("never read")
  with (pathlib.Path(folder) / storage.DIGESTS).open("a") as file:
    file.write(f"{'0' * 64}  ../../secret\n")
  (found,) = storage.damage(folder)
  assert "secret is missing" in found


def test_parts_of_the_work_find_together_what_one_finds(workdir):
  for path in _files(workdir, 6)[:-1]:
    if path.stat().st_size and path.name != storage.DIGESTS:
      _flip(path)
  folder = workdir / "checkpoints" / "6"
  whole = storage.damage(folder)
  parts = [storage.damage(folder, part, 3) for part in range(3)]
  assert all(parts)
  assert sorted(problem for part in parts for problem in part) == sorted(whole)


def test_the_best_and_those_of_every_so_many_steps_are_kept(tmp_path, config, states, alone):
  data = datasets.load(config.data).batches(alone)
  losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 4.0, 6: None, 7: 5.0}
  for steps in ((1, 2, 3, 4), (5, 6, 7)):  # what was best is known to a run that goes on
    with Checkpoints(epath.Path(tmp_path), keep=2, every=5, best=1) as checkpoints:
      for step in steps:
        checkpoints.save(step, states[3], data, config, losses[step])
  assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 5, 6, 7]
