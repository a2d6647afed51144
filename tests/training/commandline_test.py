"""Flags of doors that take a trained run: only what is given counts, and what is mistyped is told."""

import subprocess
import sys

import pytest

from mc_jax.training import commandline

DOOR = """
import sys
from absl import app
from mc_jax.errors import ConfigError
from mc_jax.training import commandline
CONFIG = commandline.define_overrides()
try:
  app.run(lambda _: print(commandline.overrides(CONFIG)), flags_parser=lambda argv: commandline.parse(CONFIG, argv))
except ConfigError as error:
  sys.exit(f"error: {error}")
"""


def _run(tmp_path, *flags):
  (tmp_path / "door.py").write_text(DOOR)
  return subprocess.run([sys.executable, tmp_path / "door.py", *flags], capture_output=True, text=True, check=False)


def test_fields_given_are_typed_and_the_others_left_out(tmp_path):
  done = _run(
    tmp_path,
    "--config.data.length=2048",
    "--config.model.memory.max_step=0.5",
    "--config.data.mqar.pairs=(4,8)",
    "--noconfig.model.tied_embeddings",
    "--config.model.memory.implementation=xla",
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == str(
    {
      "data.length": 2048,
      "model.memory.max_step": 0.5,
      "data.mqar.pairs": (4, 8),
      "model.tied_embeddings": False,
      "model.memory.implementation": "xla",
    }
  )


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.model.memory.agregation=ssc", "nearest field is model.memory.aggregation"),
    ("--config.data.length=two", "config.data.length=two: invalid literal"),
    ("--config=configs/quickstart.py", "the run's own is read from --workdir=RUN"),
    ("--steps=2", "there is no flag --steps; did you mean --config.train.steps?"),
    ("--zzzz", "there is no flag --zzzz; --help lists those there are"),
    ("data.length=2", "not a flag: data.length=2"),
  ],
)
def test_mistakes_end_with_a_clean_message(tmp_path, flag, message):
  done = _run(tmp_path, flag)
  assert done.returncode != 0
  assert message in done.stderr
  assert "Traceback" not in done.stderr


def test_a_config_file_below_the_home_folder_is_found(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  given = ["train", "--config=~/a.py", "-config=~/a.py:x=1", "--config.data.paths=~/b", "--config=c~", "--config"]
  expected = ["train", "--config=/home/me/a.py", "-config=/home/me/a.py:x=1", *given[3:]]
  assert commandline.expanded(given) == expected
