"""Trains a model: `python -m mc_jax.train --config=configs/quickstart.py --workdir=DIR`.

Every field of the configuration is a flag, such as --config.model.memory.aggregation=ssc. If the run is stopped, the
same command resumes it from --workdir.
"""

import pathlib
import sys

import mc_jax.xla_flags  # noqa: F401  isort: skip  (before jax)
import jax
from absl import flags, logging
from ml_collections import config_flags

from mc_jax import cli
from mc_jax.training import config, distributed, loop, metrics, outputs, profiling, replay

CONFIG = cli.config_flag()
WORKDIR = cli.path_flag(
  "workdir", None, "Folder for everything the run writes, or gs://BUCKET/FOLDER; default: runs/NAME of the config."
)
PROFILE = flags.DEFINE_string("profile", None, "Steps to trace with jax.profiler into the workdir, such as 10-12.")
REPLAY = flags.DEFINE_integer(
  "replay",
  None,
  "Step that ended the run and was dumped to WORKDIR/replay: run it again, and print what is not finite.",
)
COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0, if the environment (Cloud TPU, GKE, Slurm) does not provide it."
)
NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Number of processes in the job; 1: only this one.", lower_bound=1
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", lower_bound=0)
HEARTBEAT = flags.DEFINE_integer(
  "heartbeat_timeout_seconds", 30, "Time after which a silent process counts as dead and the others end.", lower_bound=1
)


def main(_: list[str]) -> None:
  """Trains as the flags say. Exits with 128 + N if signal N stopped the run, which can be resumed."""
  try:
    _train()
  except jax.errors.JaxRuntimeError as error:
    distributed.leave(error)


def _train() -> None:
  name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
  workdir = outputs.workdir(WORKDIR.value or f"runs/{name}")
  profile = profiling.parse(PROFILE.value) if PROFILE.value else range(0)
  run = config.from_config_dict(CONFIG.value).check()
  distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, HEARTBEAT.value)
  if not distributed.is_first():
    cli.silence()  # only the first process prints
  if REPLAY.value is not None:
    print(replay.replay(run, workdir, REPLAY.value))
    return
  result = loop.train(run, workdir, profile)
  if result.stopped_by:
    print(f"stopped at step {result.step}; the same command resumes", file=sys.stderr)
    sys.exit(128 + result.stopped_by)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  cli.run(
    main,
    CONFIG,
    verbosity=logging.FATAL,  # Orbax logs a page per checkpoint, and several per error that is raised anyway
    outlives_output=True,
    hopeless=(metrics.Diverged,),
    interrupted="stopped at once; the same command resumes from the last checkpoint",
  )
