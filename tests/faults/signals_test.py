"""SIGTERM at the size of the quickstart: in time, with its status, resumed by the same command; a closed terminal."""

import os
import pathlib
import pty
import signal
import subprocess
import sys
import termios
import time

import pytest
from etils import epath

from mc_jax import storage
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
  assert f"stopped at step {step}; the same command resumes" in printed
  assert (tmp_path / "checkpoints" / str(step)).is_dir()
  process = _start(tmp_path)
  _wait_for_line(process, f"resuming from the checkpoint of step {step}")
  process.kill()
  process.communicate()


def test_sigterm_before_the_first_step_ends_at_once(tmp_path):
  process = _start(tmp_path)
  _wait_for_line(process, "compiling the training step")
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == -signal.SIGTERM


TINY = [
  "--config.data.source=text",
  "--config.data.validation_fraction=0.3",
  "--config.data.length=16",
  "--config.data.packing.method=best_fit",
  "--config.data.workers=1",  # which the terminal's signal reaches as well
  "--config.model.pattern=attention",
  "--config.model.layers=1",
  "--config.model.d_model=16",
  "--config.model.mlp_dim=16",
  "--config.train.steps=100000",
  "--config.train.eval_every=100000",
  "--config.train.checkpoint_every=100000",
]


@pytest.mark.slow
def test_a_terminal_that_closes_ends_a_run_with_a_checkpoint(texts, tmp_path):
  """Its bar draws on the terminal: nothing can be written there any more when the checkpoint is to be."""
  command = ["-m", "mc_jax.train", "--config=configs/quickstart.py", f"--workdir={tmp_path}", *TINY]
  process, terminal = pty.fork()
  if not process:
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, *command, f"--config.data.paths={texts}"])
  termios.tcsetwinsize(terminal, (24, 120))
  shown, deadline = b"", time.monotonic() + 100
  while b"bits per byte," not in shown:
    shown += os.read(terminal, 1024)
    assert time.monotonic() < deadline, shown
  os.close(terminal)
  status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
  assert status == 128 + signal.SIGHUP, shown.decode()
  step = max(record["step"] for record in metrics.read(tmp_path))
  assert storage.damage(epath.Path(tmp_path) / "checkpoints" / str(step)) == []
