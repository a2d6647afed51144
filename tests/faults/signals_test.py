"""SIGTERM at the size of the quickstart: in time, with its status, and the same command goes on."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mc_jax.training import metrics

ROOT = pathlib.Path(__file__).parent.parent.parent


def _start(workdir):
  command = [sys.executable, "-m", "mc_jax.train", "--config=configs/quickstart.py", f"--workdir={workdir}"]
  flags = ["--config.train.log_every=1", "--config.data.validation_tokens=8192"]
  cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  return subprocess.Popen([*command, *flags], cwd=ROOT, env=os.environ | cache, **pipes)


def _wait_for_line(process, text):
  for line in process.stdout:
    if text in line:
      return
  raise AssertionError(f"it ended without a word of {text!r}")


@pytest.mark.slow
def test_sigterm_ends_a_quickstart_within_30_seconds_and_the_same_command_goes_on(tmp_path):
  process = _start(tmp_path)
  deadline = time.monotonic() + 300
  while not metrics.read(tmp_path):
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  begin = time.monotonic()
  printed = process.communicate(timeout=120)[0]
  assert time.monotonic() - begin < 30
  assert process.returncode == 128 + signal.SIGTERM, printed
  step = max(record["step"] for record in metrics.read(tmp_path))
  assert f"stopped at step {step}; the same command goes on from there" in printed
  assert (tmp_path / "checkpoints" / str(step)).is_dir()
  process = _start(tmp_path)
  _wait_for_line(process, f"going on from the checkpoint of step {step}")
  process.kill()
  process.communicate()


def test_sigterm_before_the_first_step_ends_at_once(tmp_path):
  process = _start(tmp_path)
  _wait_for_line(process, "compiling the training step")
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == -signal.SIGTERM
