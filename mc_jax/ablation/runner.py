"""Runs the cells of a grid, each in its own processes: training, then evaluation, resumed after a kill.

A cell's folder, WORKDIR/cells/NAME, is the workdir of its run, with two more files: cell.json describes the cell, and
log.txt has the output of its processes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import tqdm
from etils import epath

from mc_jax import storage
from mc_jax.ablation.grid import Cell, in_cells
from mc_jax.data import lock
from mc_jax.errors import ConfigError
from mc_jax.evaluation import Options, tasks
from mc_jax.training import checkpointing, interrupt, metrics
from mc_jax.training import config as config_lib
from mc_jax.training.progress import duration

FOLDER = "cells"
FACTS = "cell.json"
LOG = "log.txt"
_LOCK = ".lock"  # not the run's own: it is held during training and evaluation
EVALUATION = "ablation"  # the name of a cell's evaluation

_POLL = 0.5  # seconds between polls of the processes
_TAIL = 15  # lines to show of a crashed cell's log


@dataclasses.dataclass(frozen=True)
class Job:
  """A cell and what to run for it.

  Attributes:
    cell: The cell of the grid.
    folder: The cell's folder.
    evaluation: Arguments of mc_jax.evaluate except --workdir and --name; empty: train only.
    grid: The command that runs the whole grid, for the record.
  """

  cell: Cell
  folder: pathlib.Path
  evaluation: tuple[str, ...]
  grid: str = dataclasses.field(default="", kw_only=True)

  @property
  def step(self) -> int:
    """The last step that was logged; a run that resumes from a checkpoint repeats some."""
    return min(_last_step(self.folder), self.cell.config.train.steps)

  @property
  def trained(self) -> bool:
    """Whether the checkpoint of the last step exists."""
    step = str(self.cell.config.train.steps)
    return storage.has_digests(epath.Path(self.folder) / checkpointing.FOLDER / step)

  def commands(self) -> list[list[str]]:
    """The commands that remain to be run, as arguments of Python; [] if the cell is finished."""
    workdir = f"--workdir={self.folder}"
    training = ["-m", "mc_jax.train", *self.cell.arguments, workdir]
    evaluation = ["-m", "mc_jax.evaluate", workdir, *self.evaluation, f"--name={EVALUATION}"]
    if not self.trained:
      return [training, evaluation] if self.evaluation else [training]
    return [evaluation] if self.evaluation and not self._evaluated() else []

  def describe(self) -> str:
    """The cell's number, name and state, and the commands that remain to be run."""
    commands = self.commands()
    state = "finished" if not commands else f"at step {self.step:,}" if self.step else "new"
    lines = [f"{self.cell.number:4}  {self.cell.name}: {state}"]
    return "\n".join(lines + [f"        {shlex.join(['python', *command])}" for command in commands])

  def _newest(self) -> int:
    """The step of the newest complete checkpoint, 0 without one."""
    return max(checkpointing.complete(epath.Path(self.folder) / checkpointing.FOLDER), default=0)

  def _evaluated(self) -> bool:
    """Whether the last step was evaluated with the same arguments."""
    record = evaluation(self.folder)
    if record.get("step") != self.cell.config.train.steps:
      return False
    arguments = {argument for argument in shlex.split(record["command"])[3:] if not argument.startswith("--workdir=")}
    return arguments == {*self.evaluation, f"--name={EVALUATION}"}

  def require_same(self) -> None:
    """Raises ConfigError if the folder holds a run of another configuration, or a longer one.

    train.* and mesh.* may change, because a run can be resumed with other values; train.start_from may not.
    """
    trained = self._newest()
    if trained > self.cell.config.train.steps:
      raise ConfigError(
        f"{self.folder} holds a model of step {trained:,}: train.steps must be at least that, got "
        f"{self.cell.config.train.steps:,}, or use another --workdir"
      )
    if (self.folder / FACTS).exists():
      facts = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
      changed = config_lib.differences(config_lib.from_stored(facts["config"]), self.cell.config)
      if lines := [
        f"  {field} was {then!r} and is now {now!r}"
        for field, (then, now) in changed.items()
        if not field.startswith(("train.", "mesh.")) or field == "train.start_from"
      ]:
        raise ConfigError("\n".join([f"{self.folder} holds another run:", *lines, "Use another --workdir"]))


def evaluation(folder: pathlib.Path) -> dict:
  """The record that mc_jax.evaluate wrote for a cell; {} if there is none."""
  try:
    return json.loads((folder / "evaluation" / f"{EVALUATION}.json").read_text(encoding="utf-8"))
  except (FileNotFoundError, ValueError):  # ValueError: a kill cut it short
    return {}


def collect(workdir: pathlib.Path) -> list[dict]:
  """The results of every finished cell below `workdir`, of this grid or another, as report.py expects them."""
  finished = []
  for path in sorted((workdir / FOLDER).glob(f"*/{FACTS}")):
    facts, records = json.loads(path.read_text(encoding="utf-8")), metrics.read(path.parent)
    steps = facts.pop("config")["train"]["steps"]
    if records and records[-1]["step"] >= steps:
      last = {name: value for name, value in records[-1].items() if name.startswith("validation_bits")}
      speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
      facts |= last | {"tokens_per_second": statistics.median(speeds), "steps": steps}
      record = evaluation(path.parent)
      if record.get("step") != steps:  # of a shorter run: the longer one is yet to be evaluated
        record = {}
      finished.append(facts | {"evaluation": record.get("command", ""), "results": record.get("results", [])})
  return sorted(finished, key=lambda facts: (facts["seed"], facts["number"]))


def jobs(
  cells: Sequence[Cell],
  workdir: pathlib.Path,
  task_names: Sequence[str],
  options: Options,
  evaluation_arguments: Sequence[str],
  command: str,
) -> list[Job]:
  """A job for every cell. Prints which tasks are left out because they do not suit a cell's model.

  Args:
    cells: The cells of the grid.
    workdir: The folder of all cells.
    task_names: The evaluation's tasks; none: the cells are trained only.
    options: The evaluation's options.
    evaluation_arguments: The same options as arguments of mc_jax.evaluate.
    command: The command that runs the whole grid.

  Raises:
    ConfigError: Tasks or options that do not suit a cell's data, or a folder that holds another run.
  """
  jobs, skipped, problems = [], {}, {}
  for cell in cells:
    for problem in tasks.problems(task_names, cell.config.data, options):
      problems.setdefault(problem, []).append(cell.name)
    unsuited = tasks.unsuited(task_names, cell.config.model)
    for name, why in unsuited.items():
      skipped.setdefault(f"{name} is left out: {why}", []).append(cell.name)
    names = [name for name in task_names if name not in unsuited]
    evaluation = (f"--tasks={','.join(names)}", *evaluation_arguments) if names else ()
    jobs.append(Job(cell, workdir / FOLDER / cell.name, evaluation, grid=command))
  if problems:
    raise ConfigError("\n".join(f"{line} ({in_cells(names)})" for line, names in problems.items()))
  for line, names in skipped.items():
    print(f"{line} ({in_cells(names)})", flush=True)
  for job in jobs:
    job.require_same()
  return jobs


def run(jobs: Sequence[Job], workdir: pathlib.Path, processes: int) -> tuple[list[str], int | None]:
  """Runs the jobs, at most `processes` at a time.

  A signal is passed on: runs leave a checkpoint, and no other cell starts. A second one kills them.

  Returns:
    The names of the cells that crashed, and the number of the signal that stopped everything, or None.
  """
  # Runs that differ only in their seeds share a compiled program. One compiled on another machine may not run here.
  environment = {"JAX_COMPILATION_CACHE_DIR": str((workdir / "compiled" / platform.node()).absolute()), **os.environ}
  environment |= {"PYTHONIOENCODING": "utf-8"}  # for logs, whatever this terminal's encoding is
  waiting, running, crashed, ended = collections.deque(jobs), [], [], 0
  begin = time.monotonic()
  first = sum(job.step for job in jobs)
  total = sum(job.cell.config.train.steps for job in jobs)
  with (
    _collected_signals() as signals,
    tqdm.tqdm(total=total, initial=first, unit="step", smoothing=0, dynamic_ncols=True, disable=None) as bar,
  ):
    while running or (waiting and not signals):
      while waiting and len(running) < processes and not signals:
        job = waiting.popleft()
        if process := _start(job, environment):
          running.append(process)
        else:
          ended += 1
          bar.write(f"[{ended}/{len(jobs)}] {job.cell.name}: another process runs or ran it")
      time.sleep(_POLL)
      for process in running:
        process.stop(len(signals))
      steps = sum(job.step for job in jobs)
      bar.n = max(bar.n, steps)
      bar.refresh()
      for process in [process for process in running if process.ended(signals)]:
        running.remove(process)
        ended += 1
        name, taken = process.job.cell.name, duration(time.monotonic() - process.begin)
        if not process.popen.returncode:
          more = steps > first and (running or waiting)
          left = (time.monotonic() - begin) / max(steps - first, 1) * (total - steps)
          rest = f", about {duration(left)} left" if more else ""
          bar.write(f"[{ended}/{len(jobs)}] {name}: done in {taken}{rest}")
        elif signals:
          bar.write(f"[{ended}/{len(jobs)}] {name}: stopped at step {process.job.step:,}")
        else:
          crashed.append(name)
          bar.write(f"[{ended}/{len(jobs)}] {name}: crashed after {taken}\n{process.tail()}")
      sys.stdout.flush()
  return crashed, signals[0] if signals else None


class _Process:
  """A job's commands in sequence, holding a lock on its folder."""

  def __init__(self, job: Job, commands: list[list[str]], environment: dict[str, str], held: lock.Lock):
    self.job, self.begin = job, time.monotonic()
    self._commands, self._environment, self._lock = commands, environment, held
    self._signals = 0
    self._log = (job.folder / LOG).open("a", encoding="utf-8", errors="backslashreplace")
    self._next()

  def ended(self, signals: Sequence[int]) -> bool:
    """Whether the last command has ended, or one has failed; otherwise starts the next when one has ended."""
    code = self.popen.poll()
    if code is None:
      return False
    if code == 0 and self._commands and not signals:
      self._next()
      return False
    self._log.close()
    self._lock.release()
    return True

  def stop(self, signals: int) -> None:
    """Requests a stop after the first signal, kills the process after the second."""
    if signals > self._signals:
      self._signals = signals
      self.popen.send_signal(signal.SIGTERM if signals == 1 else signal.SIGKILL)

  def tail(self) -> str:
    """The last lines of its log."""
    lines = (self.job.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"  the end of {self.job.folder / LOG}:", *(f"  | {line}" for line in lines[-_TAIL:])])

  def _next(self) -> None:
    command = [sys.executable, *self._commands.pop(0)]
    self._log.write(f"$ {shlex.join(['python', *command[1:]])}\n")
    self._log.flush()
    self.popen = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=self._log,
      stderr=subprocess.STDOUT,
      env=self._environment,
      start_new_session=True,  # Ctrl-C reaches it only through `stop`
      pass_fds=self._lock.descriptors,  # the lock is held until the run ends, even if this process is killed
    )


def _start(job: Job, environment: dict[str, str]) -> _Process | None:
  """The running job; None if another process is running it or has finished it."""
  try:
    held = lock.take(job.folder, "runs the cell in", "leave it to that one", _LOCK)
  except lock.Taken:
    return None
  if not (commands := job.commands()):
    held.release()
    return None
  cell, path = job.cell, job.folder / FACTS
  if job.trained and path.exists():
    facts = json.loads(path.read_text(encoding="utf-8"))
  else:
    facts = {"number": cell.number, "name": cell.name, "values": cell.values, "seed": cell.seed}
    facts |= {"command": shlex.join(["python", "-m", "mc_jax.train", *cell.arguments]), **_machine()}
    facts |= {"config": dataclasses.asdict(cell.config)}
  storage.write(path, json.dumps(facts | {"grid": job.grid}, indent=1) + "\n")
  return _Process(job, commands, environment, held)


def _machine() -> dict[str, str | int | None]:
  """The machine a cell runs on, and the versions it uses."""
  here = pathlib.Path(__file__).parent
  git = subprocess.run(["git", "describe", "--always"], cwd=here, capture_output=True, text=True, check=False)
  versions = {name: importlib.metadata.version(name) for name in ("jax", "mc_jax")}
  return {"machine": platform.machine(), "cores": os.cpu_count(), **versions, "commit": git.stdout.strip() or None}


def _last_step(folder: pathlib.Path) -> int:
  """The last step in a run's metrics, 0 if there is none. Only the end of the file is read."""
  try:
    with (folder / metrics.JSONL).open("rb") as file:
      file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
      lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"}\n")]
    return int(json.loads(lines[-1])["step"])
  except (OSError, IndexError, ValueError):
    return 0


@contextlib.contextmanager
def _collected_signals() -> Iterator[list[int]]:
  """Appends the signals that request a stop to the list it yields, instead of obeying them."""
  signals: list[int] = []

  def first(number: int) -> None:
    signals.append(number)
    interrupt.print_line("\nstopping, with checkpoints; again to stop at once")

  with interrupt.handled(first, signals.append):
    yield signals
