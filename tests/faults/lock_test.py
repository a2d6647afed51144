"""Two runs in one workdir: the first is not disturbed, the second ends with a line that names it."""

import os
import signal

import pytest
from marks import slow

from mc_jax.data import lock


@pytest.fixture(scope="module")
def config(tiny):
  return tiny(pattern="attention", steps=12, eval_every=4, checkpoint_every=4)


@pytest.fixture(scope="module")
def undisturbed(config, forks, records, tmp_path_factory):
  """The records of a run that had its workdir for itself."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  forks.start(config, workdir)
  status, printed = forks.finish()
  assert status == 0, printed
  assert not (workdir / lock.FILE).exists()
  return records(workdir)


def _listing(workdir):
  return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in workdir.rglob("*")}


def _is_refused(rivals, config, workdir, pid):
  rivals.start(config, workdir)
  status, printed = rivals.finish()
  assert status == 1, printed
  assert f"another process trains in {workdir}: pid {pid} on " in printed
  assert "stop it, or use another --workdir" in printed


@pytest.mark.parametrize("phase", [slow("step"), slow("save"), "commit", slow("digests"), slow("evaluation")])
def test_a_second_run_is_refused_and_the_first_undisturbed(
  config, forks, rivals, records, undisturbed, tmp_path, phase
):
  forks.start(config, tmp_path)
  assert forks.wait_for(f"phase {phase}"), forks.finish()
  forks.kill(signal.SIGSTOP)
  before = _listing(tmp_path)
  _is_refused(rivals, config, tmp_path, forks.process)
  assert _listing(tmp_path) == before
  forks.kill(signal.SIGCONT)
  status, printed = forks.finish()
  assert status == 0, printed
  assert records(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_run_that_is_being_resumed_has_its_workdir_at_once(config, forks, rivals, records, undisturbed, tmp_path):
  """SIGKILL leaves no lock behind."""
  forks.start(config, tmp_path)
  assert forks.wait_for("phase digests", 2), forks.finish()
  forks.kill()
  assert forks.finish()[0] == -signal.SIGKILL
  forks.start(config, tmp_path)
  assert forks.wait_for("phase restore"), forks.finish()
  forks.kill(signal.SIGSTOP)
  _is_refused(rivals, config, tmp_path, forks.process)
  forks.kill(signal.SIGCONT)
  status, printed = forks.finish()
  assert status == 0, printed
  assert records(tmp_path) == undisturbed


def test_of_two_that_start_together_one_trains(config, forks, rivals, records, undisturbed, tmp_path):
  forks.start(config, tmp_path)
  rivals.start(config, tmp_path)
  (one, said), (other, replied) = forks.finish(), rivals.finish()
  assert sorted((one, other)) == [0, 1], said + replied
  assert "another process trains in" in (said if one else replied)
  assert records(tmp_path) == undisturbed


def test_a_stopped_run_gives_its_workdir_back(config, forks, rivals, tmp_path):
  forks.start(config, tmp_path)
  assert forks.wait_for("phase step", 2), forks.finish()
  forks.kill(signal.SIGTERM)
  assert forks.finish()[0] == 128 + signal.SIGTERM
  assert lock.FILE not in os.listdir(tmp_path)
