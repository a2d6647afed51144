"""Trains a model: `python -m mc_jax.train --config=configs/quickstart.py --workdir=DIR`.

Every field of the configuration is a flag, such as --config.model.memory.aggregation=ssc. The same
command goes on where an earlier run in the same --workdir stopped.
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
  "workdir", None, "folder of everything the run writes, or gs://BUCKET/FOLDER; default: runs/NAME of the config"
)
PROFILE = flags.DEFINE_string("profile", None, "steps to trace with jax.profiler, such as 10-12, into the workdir")
REPLAY = flags.DEFINE_integer(
  "replay", None, "step that ended the run and lies in WORKDIR/replay: runs it again, and tells what is not finite"
)
COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0, where the environment (Cloud TPU, GKE, Slurm) does not tell it"
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes of the job; 1: this one alone", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "number of this process, from 0", lower_bound=0)
HEARTBEAT = flags.DEFINE_integer(
  "heartbeat_timeout_seconds",
  30,
  "after which a silent process is taken for dead, which ends the others",
  lower_bound=1,
)


def main(_: list[str]) -> None:
  """Trains as the flags say. Exits with 128 + the signal's number if a signal stopped the run, which can be resumed."""
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
    cli.silence()  # one process speaks for all
  if REPLAY.value is not None:
    print(replay.replay(run, workdir, REPLAY.value))
    return
  result = loop.train(run, workdir, profile)
  if result.stopped_by:
    print(f"stopped at step {result.step}; the same command goes on from there", file=sys.stderr)
    sys.exit(128 + result.stopped_by)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  cli.run(
    main,
    CONFIG,
    verbosity=logging.FATAL,  # Orbax prints a page per checkpoint, and several per error that reaches us
    outlives_output=True,
    hopeless=(metrics.Diverged,),
    interrupted="stopped at once; the same command resumes from the last checkpoint",
  )
