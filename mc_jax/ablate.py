"""Trains and evaluates a grid of models, and reports means and standard errors over seeds.

    python -m mc_jax.ablate --config=configs/mqar.py --workdir=ABLATION --seeds=3 --processes=2
        --grid=model.memory.rule=linear,titans --grid=model.memory.aggregation=none,grm --tasks=mqar --pairs=2,4,8

Other fields of the configuration, such as --config.train.steps=2000, apply to all cells. If it is stopped, the same
command resumes it. With --cell=N it runs one cell, for a cluster's array jobs (docs/ablations.md).
"""

import pathlib
import re
import sys

from absl import flags, logging

from mc_jax import cli, storage
from mc_jax.ablation import grid, report, runner
from mc_jax.errors import ConfigError
from mc_jax.evaluation import task_flags
from mc_jax.training import config

CONFIG = cli.config_flag()
GRID = flags.DEFINE_multi_string("grid", [], "FIELD=VALUE,VALUE,... (model.memory.rule=linear,titans); repeatable.")
SEEDS = flags.DEFINE_integer(
  "seeds", 1, "Number of seeds for each combination; train.seed and data.seed count up.", lower_bound=1
)
WORKDIR = cli.path_flag("workdir", None, "Folder for all cells and the report; default: runs/ablation.")
PROCESSES = flags.DEFINE_integer("processes", 1, "Number of cells to run at the same time.", lower_bound=1)
CELL = flags.DEFINE_integer("cell", None, "Run only this cell, counted from 0, and write no report.")
CELLS = flags.DEFINE_boolean("cells", False, "Print the number of cells and exit.")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the cells and their commands and exit.")
REPORT = flags.DEFINE_boolean("report", False, "Only write the report, from finished cells and an earlier report.")
task_flags.define()


def main(_: list[str]) -> None:
  """Runs what the flags say. Exits with 1 if a cell crashed, and with 128 + N after signal N."""
  if storage.in_bucket(WORKDIR.value or ""):
    raise ConfigError(f"--workdir must be a folder that all cells' machines see, got {WORKDIR.value}")
  workdir = pathlib.Path(WORKDIR.value or "runs/ablation")
  if REPORT.value:
    print(report.update(workdir / "report", runner.collect(workdir)))
    return
  shared = grid.config_arguments(sys.argv[1:], config.from_config_dict(CONFIG.value) if CONFIG.present else None)
  cells = grid.cells(shared, GRID.value, SEEDS.value)
  if CELLS.value:
    print(len(cells))
    return
  if CELL.value is not None and not 0 <= CELL.value < len(cells):
    raise ConfigError(f"--cell must be one of 0 to {len(cells) - 1}, got {CELL.value}")
  command = re.sub(r" --?cell[= ]\d+", "", cli.command("ablate"))
  options, names = task_flags.options(), task_flags.names()  # checked before hours of training
  jobs = runner.jobs(cells, workdir, names, options, task_flags.arguments(), command)
  if DRY_RUN.value:
    print("\n".join(job.describe() for job in jobs))
    return
  chosen = jobs if CELL.value is None else [jobs[CELL.value]]
  unfinished = [job for job in chosen if job.commands()]
  print(f"{len(chosen)} of {len(cells)} cells, {len(chosen) - len(unfinished)} already finished", flush=True)
  crashed, stopped_by = runner.run(unfinished, workdir, PROCESSES.value)
  if CELL.value is None and not stopped_by:
    print(report.update(workdir / "report", runner.collect(workdir)))
  if crashed:
    print(f"{len(crashed)} of {len(chosen)} cells crashed: {', '.join(crashed)}; the same command tries them again")
  if stopped_by:
    print("stopped; the same command resumes", file=sys.stderr)
    sys.exit(128 + stopped_by)
  sys.exit(1 if crashed else 0)


if __name__ == "__main__":
  cli.run(main, CONFIG, verbosity=logging.WARNING, outlives_output=True)
