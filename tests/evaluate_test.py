"""The door: `python -m mc_jax.evaluate` as its user meets it."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from mc_jax.data import datasets
from mc_jax.models import MemoryConfig
from mc_jax.training import state
from mc_jax.training.checkpointing import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent


def _evaluate(*flags):
  command = [sys.executable, "-m", "mc_jax.evaluate", *flags]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tiny, alone, tmp_path_factory):
  """A workdir with a checkpoint of a model that never saw anything."""
  workdir = epath.Path(tmp_path_factory.mktemp("run"))
  config = tiny(memory=MemoryConfig(rule="linear", aggregation="none", chunk=4, segment_length=8))
  start, batches = state.create(config, alone), datasets.load(config.data).batches(alone)
  with Checkpoints(workdir, keep=2) as checkpoints:
    checkpoints.save(3, start, batches, config)
  return workdir


def test_results_are_printed_and_written(run):
  done = _evaluate(
    f"--workdir={run}",
    "--tasks=perplexity,mqar,gates_mqar",
    "--lengths=16,32",
    "--pairs=2,4",
    "--rows=4",
    "--config.data.mqar.vocab_size=256",
    "--config.model.memory.after_training=grm",
    "--name=both",
  )
  assert done.returncode == 0, done.stderr
  record = json.loads((run / "evaluation" / "both.json").read_text())
  assert record["step"] == 3
  assert record["changed"] == {"data.mqar.vocab_size": 256, "model.memory.after_training": "grm"}
  assert record["config"]["model"]["memory"]["segment_length"] == 16  # the training length
  settings = [(result["task"], result["settings"]["length"]) for result in record["results"]]
  recall = [(task, n) for task in ("mqar", "gates_mqar") for n in (16, 16, 32, 32)]
  assert settings == [("perplexity", n) for n in (16, 32)] + recall
  for result in record["results"]:
    if result["task"] == "perplexity":
      assert f"{result['values']['loss']:.4f}" in done.stdout
  assert (run / "evaluation" / "both.csv").read_text().count("\n") == 11
  assert (run / "evaluation" / "both.png").exists()
  assert (run / "evaluation" / "both_map.png").exists()
  (read, *_) = record["results"][-1]["reads"]
  assert np.shape(read["gamma"]) == (1, 2, 2)  # layers, heads, the online memory and one cache


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--tasks=perplexitty"], "or lm_eval:TASK for one of lm-evaluation-harness; got perplexitty"),
    (["--tasks=perplexity", "--lengths=16,long"], "flag --lengths=16,long: must be whole numbers, separated by commas"),
    (["--tasks=mqar,gates_mqar"], "--tasks: gates_mqar: it needs gates that depend on the token"),
    (["--tasks=perplexity", "--config.model.layers=2"], "--config.model.layers: 1 in the checkpoint, 2 requested"),
  ],
  ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_end_with_a_clean_message(run, door, flags, message):
  done = door("evaluate", f"--workdir={run}", *flags)
  assert done.returncode == 2
  assert message in done.stderr
  assert "Traceback" not in done.stderr
