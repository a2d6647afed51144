"""Runs in processes that can be killed."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mc_jax.training import metrics

ROOT = pathlib.Path(__file__).parent.parent.parent


class Forks:
  """Talks to forks.py, a run at a time."""

  def __init__(self, folder):
    program = [sys.executable, str(pathlib.Path(__file__).parent / "forks.py")]
    self._server = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    self._folder, self._logs, self._running = folder, 0, False

  def start(self, config, workdir, **job):
    """Starts a run; see forks.py for what it may be told. One that a failed test left behind, perhaps stopped, ends."""
    if self._running:
      self.kill()
      self.finish()
    self._running = True
    self._logs += 1
    self.log = self._folder / f"{self._logs}.log"
    self.log.touch()
    job |= {"config": dataclasses.asdict(config), "workdir": str(workdir), "log": str(self.log)}
    print(json.dumps(job | {"cache": str(ROOT / ".jax_cache")}), file=self._server.stdin, flush=True)
    self.process = int(self._server.stdout.readline())

  def wait_for(self, line, times=1):
    """Returns when the run has printed a line so many times; False: it has ended before."""
    deadline = time.monotonic() + 120
    while self.log.read_text().count(f"{line}\n") < times:
      assert time.monotonic() < deadline, self.log.read_text()
      if not os.path.exists(f"/proc/{self.process}"):
        return False
      time.sleep(0.001)
    return True

  def kill(self, number=signal.SIGKILL):
    """Sends a signal; after SIGSTOP every thread has stopped, those too that were writing a file."""
    os.kill(self.process, number)
    deadline = time.monotonic() + 60
    while number == signal.SIGSTOP and any(state != "T" for state in self._thread_states()):
      assert time.monotonic() < deadline, self.log.read_text()
      time.sleep(0.001)

  def _thread_states(self):
    for task in pathlib.Path(f"/proc/{self.process}/task").iterdir():
      with contextlib.suppress(FileNotFoundError):  # the thread has ended
        yield task.joinpath("stat").read_text().rpartition(")")[2].split()[0]

  def finish(self):
    """(exit status, what was printed)."""
    status = int(self._server.stdout.readline())
    self._running = False
    return status, self.log.read_text()

  def close(self):
    if self._running:
      self.kill()
    self._server.stdin.close()
    self._server.wait()


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
  forks = Forks(tmp_path_factory.mktemp("logs"))
  yield forks
  forks.close()


@pytest.fixture(scope="module")
def rivals(tmp_path_factory):
  """Runs beside those of `forks`."""
  rivals = Forks(tmp_path_factory.mktemp("rivals"))
  yield rivals
  rivals.close()


def _records(workdir):
  timed = ("step_time", "tokens_per_second", "mfu")
  return [{name: value for name, value in record.items() if name not in timed} for record in metrics.read(workdir)]


@pytest.fixture(scope="session")
def records():
  """(workdir) -> of a run's records, all that is the same whenever it is computed."""
  return _records
