"""What hangs is ended with the stacks of all threads; what is slow says so."""

import subprocess
import sys
import time

import pytest
from marks import slow

from mc_jax.training.watchdog import heartbeat

# Steps that end, then one that never does: in Python, or in C code that holds the interpreter's lock.
HANGS = """
import ctypes, time
from mc_jax.training.watchdog import Watchdog

def hang():
  {how}

with Watchdog(minutes={minutes}) as watchdog:
  for _ in range(4):
    time.sleep(0.5)
    watchdog.finished()
  print("alive", flush=True)
  hang()
"""


@pytest.mark.parametrize(
  ("how", "told"),
  [
    pytest.param(
      "time.sleep(60)", "no step, evaluation or checkpoint has ended for 0:02 (train.hang_minutes)", id="python"
    ),
    slow("ctypes.PyDLL(None).sleep(60)", "Timeout (0:00:03", id="c"),
  ],
)
def test_a_hang_ends_with_the_stacks_of_all_threads(how, told):
  program = HANGS.format(how=how, minutes=2 / 60)
  begin = time.monotonic()
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
  assert time.monotonic() - begin < 45
  assert done.returncode == 1
  assert done.stdout == "alive\n"  # steps took longer than the limit together, none alone
  assert told in done.stderr
  assert "in hang" in done.stderr
  assert done.stderr.count("hread 0x") >= 2  # the watchdog is one, the "Current thread"


def test_without_a_limit_and_after_its_end_nothing_is_ended():
  program = HANGS.format(how="time.sleep(0.1)", minutes=0) + HANGS.format(how="pass", minutes=1 / 60)
  program += "time.sleep(2.5)\nprint('end')"
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.endswith("end\n")


def test_what_is_slow_says_so(capsys):
  with heartbeat("compiling", every=0.2):
    time.sleep(0.5)
  printed = capsys.readouterr().out.splitlines()
  assert printed[:2] == ["still compiling, for 0:00 now"] * 2
  with heartbeat("compiling", every=10):
    pass
  assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_step_that_never_ends_ends_the_run(forks, tiny, tmp_path):
  config = tiny(pattern="attention", hang_minutes=4 / 60, eval_every=100)
  forks.start(config, tmp_path, hangs_at=8)
  status, printed = forks.finish()
  assert status == 1
  assert "step 2/6: " in printed
  assert "no step, evaluation or checkpoint has ended for 0:04" in printed
  assert "in hanging" in printed


@pytest.mark.slow
def test_a_last_checkpoint_that_is_never_complete_ends_the_run(forks, tiny, tmp_path):
  config = tiny(pattern="attention", hang_minutes=4 / 60, eval_every=100, checkpoint_every=100)
  forks.start(config, tmp_path, never_completes=True)
  status, printed = forks.finish()
  assert status == 1
  assert "step 6/6: " in printed
  assert "no step, evaluation or checkpoint has ended for 0:04" in printed
  assert "in hanging_completion" in printed
