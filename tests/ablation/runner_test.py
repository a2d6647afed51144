"""Cells in processes: so many at a time, crashes and signals told, no cell twice at once. What runs stands in for
training."""

import dataclasses
import json
import os
import signal
import threading
import time

import pytest

from mc_jax.ablation import runner
from mc_jax.ablation.grid import Cell
from mc_jax.data import lock
from mc_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Script(runner.Job):
  """A job that runs Python code, until it has left a file `done`."""

  codes: tuple[str, ...] = ()

  def commands(self):
    done = f"open({str(self.folder / 'done')!r}, 'w').write('')"
    return [] if (self.folder / "done").exists() else [["-c", code] for code in (*self.codes, done)]


@pytest.fixture
def script(tiny, tmp_path):
  def make(name, *codes):
    return Script(Cell(0, name, {"name": name}, 0, (), tiny()), tmp_path / "cells" / name, (), codes)

  return make


@pytest.fixture(autouse=True)
def often(monkeypatch):
  monkeypatch.setattr(runner, "_POLL", 0.02)


def test_a_crashed_cell_is_told_and_does_not_stop_the_rest(script, tmp_path, capsys):
  jobs = [script("bad", "print('so far'); 1 / 0", "print('never')"), script("good", "print('fine')")]
  assert runner.run(jobs, tmp_path, 1) == (["bad"], None)
  assert not jobs[0].commands() == jobs[1].commands() == []
  told = capsys.readouterr().out
  assert "bad: crashed" in told
  assert "| ZeroDivisionError" in told
  assert "good: done" in told
  log = (jobs[0].folder / runner.LOG).read_text()
  assert "so far" in log
  assert "\nnever" not in log
  assert json.loads((jobs[1].folder / runner.FACTS).read_text())["values"] == {"name": "good"}


@pytest.mark.parametrize("processes", [1, 2])
def test_so_many_run_at_a_time(script, tmp_path, processes):
  path = str(tmp_path / "times")
  code = f"import time; f = open({path!r}, 'a'); print(1, time.time(), file=f); f.flush()\n"
  code += "for _ in range(200):  # until another has begun, where another may\n"
  code += f"  time.sleep(0.05 if len(open({path!r}).readlines()) < {processes} else 0)\n"
  code += "print(-1, time.time(), file=f)"
  assert runner.run([script(str(n), code) for n in range(4)], tmp_path, processes) == ([], None)
  events = sorted((line.split() for line in (tmp_path / "times").read_text().splitlines()), key=lambda e: e[1])
  at_once = [sum(int(change) for change, _ in events[: n + 1]) for n in range(len(events))]
  assert len(events) == 8
  assert max(at_once) == processes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_handed_on_and_no_other_cell_begins(script, tmp_path, number):
  folder = tmp_path / "cells" / "first"
  code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('asked to stop'), sys.exit(143))); "
  code += f"open({str(folder / 'ready')!r}, 'w'); time.sleep(60)"

  def send():
    while not (folder / "ready").exists():
      time.sleep(0.02)
    os.kill(os.getpid(), number)

  before = signal.getsignal(number)
  threading.Thread(target=send).start()
  begin = time.monotonic()
  jobs = [script("first", code), script("second", "")]
  assert runner.run(jobs, tmp_path, 1) == ([], number)
  assert time.monotonic() - begin < 30
  assert "asked to stop" in (folder / runner.LOG).read_text()
  assert not jobs[1].folder.exists()
  assert signal.getsignal(number) == (signal.SIG_IGN if number == signal.SIGHUP else before)
  signal.signal(number, before)


def test_a_cell_that_another_process_runs_is_left_to_it(script, tmp_path, capsys):
  job = script("taken", "")
  with lock.take(job.folder, "", "", runner._LOCK):
    assert runner.run([job], tmp_path, 1) == ([], None)
    assert "another process runs or ran it" in capsys.readouterr().out
    assert job.commands()
  assert runner.run([job], tmp_path, 1) == ([], None)
  assert not job.commands()


def test_the_lock_outlives_who_started_the_cell(script, tmp_path):
  job = script("orphan", "import time; time.sleep(60)")
  process = runner._start(job, dict(os.environ))
  lock._close_in_child()  # as if this process had been killed
  assert runner._start(job, dict(os.environ)) is None
  process.popen.kill()
  process.popen.wait()
  process = runner._start(job, dict(os.environ))
  assert process is not None
  process.popen.kill()
  process.popen.wait()


def test_a_folder_of_another_configuration_is_refused(script, tmp_path, tiny):
  job = script("cell")
  runner.run([job], tmp_path, 1)
  job.require_same()
  longer = dataclasses.replace(job, cell=dataclasses.replace(job.cell, config=tiny(steps=9)))
  longer.require_same()
  other = dataclasses.replace(job, cell=dataclasses.replace(job.cell, config=tiny(length=32)))
  with pytest.raises(ConfigError, match=r"data.length was 16 and is now 32"):
    other.require_same()


def test_a_longer_run_is_not_called_shorter(script, tmp_path, tiny, monkeypatch):
  monkeypatch.setattr(runner.storage, "has_digests", lambda folder: folder.name == "6")
  job = script("cell")
  for step in (6, 9):  # the last one is not complete
    (job.folder / "checkpoints" / str(step)).mkdir(parents=True)
  job.require_same()
  shorter = dataclasses.replace(job, cell=dataclasses.replace(job.cell, config=tiny(steps=5)))
  with pytest.raises(ConfigError, match=r"holds a model of step 6: train.steps must be at least that, got 5"):
    shorter.require_same()


def test_a_run_that_started_elsewhere_is_refused(script, tmp_path, tiny):
  job = script("cell")
  runner.run([job], tmp_path, 1)
  other = dataclasses.replace(job, cell=dataclasses.replace(job.cell, config=tiny(start_from="runs/other")))
  with pytest.raises(ConfigError, match=r"train.start_from was '' and is now 'runs/other'"):
    other.require_same()


@pytest.mark.parametrize(("step", "results"), [(6, [{"task": "mqar"}]), (3, [])])
def test_results_are_those_of_the_last_step(script, tmp_path, monkeypatch, step, results):
  job = script("cell")
  runner.run([job], tmp_path, 1)
  records = [{"step": 3, "tokens_per_second": 5.0}, {"step": 6, "tokens_per_second": 7.0}]
  monkeypatch.setattr(runner.metrics, "read", lambda folder: records)
  (job.folder / "evaluation").mkdir()
  record = {"step": step, "command": "evaluate", "results": [{"task": "mqar"}]}
  (job.folder / "evaluation" / f"{runner.EVALUATION}.json").write_text(json.dumps(record))
  (facts,) = runner.collect(tmp_path)
  assert facts["steps"] == 6
  assert facts["results"] == results
