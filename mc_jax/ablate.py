"""Trains and evaluates a grid of models, and reports: means and standard errors over seeds, plots.

    python -m mc_jax.ablate --config=configs/mqar.py --workdir=ABLATION --seeds=3 --processes=2
        --grid=model.memory.rule=linear,titans --grid=model.memory.aggregation=none,grm --tasks=mqar --pairs=2,4,8

Other fields of the configuration, such as --config.train.steps=2000, hold for all cells. The same command goes on where
it was stopped; with --cell=N it runs one cell, for a cluster's array jobs (docs/ablations.md).
"""

import pathlib
import re
import shlex
import sys

from absl import flags, logging

from mc_jax import cli, storage
from mc_jax.errors import ConfigError
from mc_jax.evaluation import ablation, tasks
from mc_jax.training import cells, config, grid, task_flags

CONFIG = cli.config_flag()
GRID = flags.DEFINE_multi_string("grid", [], "FIELD=VALUE,VALUE,... (model.memory.rule=linear,titans); repeatable")
SEEDS = flags.DEFINE_integer("seeds", 1, "of each combination: train.seed and data.seed, counted up", lower_bound=1)
WORKDIR = cli.path_flag("workdir", None, "folder of all cells and of the report")
PROCESSES = flags.DEFINE_integer("processes", 1, "cells that run at the same time", lower_bound=1)
CELL = flags.DEFINE_integer("cell", None, "run this one alone, counted from 0, without the report")
CELLS = flags.DEFINE_boolean("cells", False, "print how many cells there are, and end")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "print the cells and their commands, and end")
REPORT = flags.DEFINE_boolean("report", False, "only report, of the finished cells or of an earlier report's JSON")
task_flags.define()


def main(_: list[str]) -> None:
  """Runs what the flags say. Exits with 1 if a cell crashed, with 128 + its number after a signal."""
  if storage.in_bucket(WORKDIR.value or ""):
    raise ConfigError(f"--workdir must be a folder that all cells' machines see, got {WORKDIR.value}")
  workdir = pathlib.Path(WORKDIR.value or "runs/ablation")
  if REPORT.value:
    report(workdir)
    return
  every = grid.cells(arguments(), GRID.value, SEEDS.value)
  if CELLS.value:
    print(len(every))
    return
  if CELL.value is not None and not 0 <= CELL.value < len(every):
    raise ConfigError(f"--cell must be one of 0 to {len(every) - 1}, got {CELL.value}")
  jobs = [
    cells.Job(cell, workdir / cells.FOLDER / cell.name, told, grid=command())
    for cell, told in zip(every, evaluations(every), strict=True)
  ]
  for job in jobs:
    job.require_same()
  if DRY_RUN.value:
    print("\n".join(map(describe, jobs)))
    return
  chosen = jobs if CELL.value is None else [jobs[CELL.value]]
  left = [job for job in chosen if job.commands()]
  print(f"{len(chosen)} of {len(every)} cells, {len(chosen) - len(left)} finished before", flush=True)
  crashed, stopped_by = cells.run(left, workdir, PROCESSES.value)
  if CELL.value is None and not stopped_by:
    report(workdir)
  if crashed:
    print(f"{len(crashed)} of {len(chosen)} cells crashed: {', '.join(crashed)}; the same command tries them again")
  if stopped_by:
    print("stopped; the same command goes on from there", file=sys.stderr)
    sys.exit(128 + stopped_by)
  sys.exit(1 if crashed else 0)


def report(workdir: pathlib.Path) -> None:
  """Prints the table and writes the report of all cells that are finished, of this grid or another, or were once."""
  folder = workdir / "report"
  finished = {cell["name"]: cell for cell in ablation.read(folder)}
  for cell in cells.collect(workdir):
    earlier = finished.get(cell["name"], {}).get("results")
    if cell["results"] or not earlier:  # what was evaluated once stays until it is again
      finished[cell["name"]] = cell
  if not finished:
    print(f"{workdir} has no finished cell to report")
    return
  print(f"\n{ablation.table(list(finished.values()))}\n")
  print(f"written to {folder}: {', '.join(ablation.write(folder, list(finished.values())))}")


def arguments() -> list[str]:
  """What the command line says of the configuration of all cells.

  Raises:
    ConfigError: a form of it that cannot be handed on.
  """
  if not CONFIG.present:
    raise ConfigError("--config=FILE is missing, the configuration of all cells, such as configs/mqar.py")
  found = [arg for arg in cli.expanded(sys.argv[1:]) if re.match(r"--?(no)?config[.=]", arg)]
  try:
    complete = grid.read(found) == config.from_config_dict(CONFIG.value)
  except ConfigError:  # absl understood the whole command line, but it is not whole in `found`
    complete = False
  if not complete:
    raise ConfigError("the configuration must be given as --config=FILE and --config.FIELD=VALUE, each one argument")
  return found


def evaluations(every: list[grid.Cell]) -> list[tuple[str, ...]]:
  """What mc_jax.evaluate is told of each cell; nothing without --tasks. Tells of tasks that do not suit a cell.

  Raises:
    ConfigError: tasks or options that no cell's data have an answer to.
  """
  options = task_flags.options()  # checked here: a cell would find out after its training
  asked, skipped, found, problems = task_flags.names(), {}, [], {}
  for cell in every:
    for problem in tasks.problems(asked, cell.config.data, options):
      problems.setdefault(problem, []).append(cell.name)
    unsuited = tasks.unsuited(asked, cell.config.model)
    names = [name for name in asked if name not in unsuited]
    found.append((f"--tasks={','.join(names)}", *task_flags.arguments()) if names else ())
    for name, why in unsuited.items():
      skipped.setdefault(f"{name} is left out: {why}", []).append(cell.name)
  if problems:
    raise ConfigError("\n".join(f"{line} ({grid.in_cells(names)})" for line, names in problems.items()))
  for line, names in skipped.items():
    print(f"{line} ({grid.in_cells(names)})", flush=True)
  return found


def command() -> str:
  """This one, for all cells."""
  return re.sub(r" --?cell[= ]\d+", "", cli.command("ablate"))


def describe(job: cells.Job) -> str:
  """The cell's number, name, state and commands."""
  commands = job.commands()
  state = "finished" if not commands else f"at step {job.step:,}" if job.step else "new"
  lines = [f"{job.cell.number:4}  {job.cell.name}: {state}"]
  return "\n".join(lines + [f"        {shlex.join(['python', *command])}" for command in commands])


if __name__ == "__main__":
  cli.run(main, CONFIG, verbosity=logging.WARNING, outlives_output=True)
