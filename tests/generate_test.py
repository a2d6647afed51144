"""The door: `python -m mc_jax.generate` as its user meets it."""

import pathlib
import subprocess
import sys

import pytest
from etils import epath

from mc_jax.data import datasets
from mc_jax.training import state
from mc_jax.training.checkpointing import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent


def _generate(*flags, words=""):
  command = [sys.executable, "-m", "mc_jax.generate", *flags]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, input=words)


@pytest.fixture(scope="module")
def run(tiny, alone, tmp_path_factory):
  """A workdir with a checkpoint of a model that never saw anything."""
  workdir = epath.Path(tmp_path_factory.mktemp("run"))
  config = tiny()
  start, batches = state.create(config, alone), datasets.load(config.data).batches(alone)
  with Checkpoints(workdir, keep=2) as checkpoints:
    checkpoints.save(3, start, batches, config)
  return workdir


@pytest.mark.slow
def test_a_prompt_is_saved_and_continued_again(run, tmp_path):
  options = [f"--workdir={run}", "--max_tokens=12", "--seed=3"]
  whole = _generate(*options, words="a memory of a memory")
  assert whole.returncode == 0, whole.stderr
  for told in ("21 tokens", "12 tokens", "cache", "compilation"):
    assert told in whole.stderr
  saved = [f"--save_prompt={tmp_path / 'prompt'}", "--context=40"]
  first = _generate(*options, *saved, "--prompt=a memory of a")
  assert first.returncode == 0, first.stderr
  again = _generate(*options, f"--load_prompt={tmp_path / 'prompt'}", "--prompt= memory")
  assert again.returncode == 0, again.stderr
  assert again.stdout == whole.stdout
  full = _generate(*options, f"--load_prompt={tmp_path / 'prompt'}", "--prompt=" + "x" * 30)
  assert full.returncode == 2
  assert "are more than the 40 that the cache is for (--context when it was saved)" in full.stderr


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([], "the prompt is empty"),
    (["--prompt=x", "--prompt_file=y"], "--prompt and --prompt_file are both given"),
    (["--prompt=x", "--max_tokens=40", "--capacity=2"], "--capacity=2 is too small: 42 tokens"),
    (["--prompt=x", "--max_tokens=40", "--context=30"], "more than the 30 that the cache is for (--context)"),
    (["--prompt=x", "--tokens=40"], "there is no flag --tokens; did you mean --max_tokens?"),
    (["--prompt=x", "--config.model.heads=1"], "--config.model.heads: 2 in the checkpoint, 1 requested"),
    (["--load_prompt=nowhere"], "nowhere does not exist"),
    (["--prompt=x", "--top_p=0"], "top_p must be above 0"),
    (["--prompt=x", "--save_prompt=configs"], "configs exists already"),
  ],
  ids=lambda value: value[-1] if isinstance(value, list) and value else "",
)
def test_mistakes_end_with_a_clean_message(run, door, flags, message):
  done = door("generate", f"--workdir={run}", *flags)
  assert done.returncode == 2
  assert message in done.stderr
  assert "Traceback" not in done.stderr


def test_a_folder_without_a_checkpoint_is_named(door, tmp_path):
  done = door("generate", f"--workdir={tmp_path}", "--prompt=x")
  assert done.returncode == 2
  assert f"--workdir={tmp_path} has no folder checkpoints/" in done.stderr
