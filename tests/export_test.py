"""The door: `python -m mc_jax.export` as its user meets it."""

import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import pytest
from etils import epath

from mc_jax.data import datasets
from mc_jax.inference import export
from mc_jax.training import state
from mc_jax.training.checkpointing import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent


def _export(*flags):
  command = [sys.executable, "-m", "mc_jax.export", *map(str, flags)]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_a_checkpoint_goes_out_and_comes_back(tiny, alone, tmp_path):
  config = tiny(pattern="attention")
  run, batches = state.create(config, alone), datasets.load(config.data).batches(alone)
  with Checkpoints(epath.Path(tmp_path / "run"), keep=1) as checkpoints:
    checkpoints.save(3, run, batches, config)
  done = _export(f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'out'}", "--dtype=bfloat16")
  assert done.returncode == 0, done.stderr
  assert "step 3: " in done.stdout
  assert "MB of bfloat16" in done.stdout
  assert {path.name for path in (tmp_path / "out").iterdir()} == {export.WEIGHTS, export.CONFIG}
  model, params = export.load(tmp_path / "out")
  assert model == config.model
  chex.assert_trees_all_equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), run.params))


@pytest.mark.parametrize(
  ("to", "flags", "message"),
  [
    ("full", [], "full is not empty, it holds mine.txt"),
    ("new", [], "has no folder checkpoints/"),
    ("new", ["--dtype=int8"], "float32|bfloat16"),
  ],
  ids=["not empty", "no checkpoint", "dtype"],
)
def test_mistakes_end_with_a_clean_message(door, tmp_path, to, flags, message):
  for name in ("run", "full"):
    (tmp_path / name).mkdir()
  (tmp_path / "full" / "mine.txt").write_text("mine")
  done = door("export", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / to}", *flags)
  assert done.returncode != 0
  assert message in done.stderr
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "new").exists()
