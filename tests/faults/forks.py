"""Runs in processes of their own that can be killed: each is forked from this one, which has imported what they need.

Started as a program. A line of standard input is a run, {"workdir", "config", "log", ...} as JSON. The answer is one,
the process's id, and another when it has ended, its exit status as subprocess gives it.
"""

import json
import os
import resource
import sys
import time
import traceback

import jax

from mc_jax import storage
from mc_jax.data import loader, windows
from mc_jax.training import config as config_lib
from mc_jax.training import loop
from mc_jax.training.checkpointing import Checkpoints

# Whoever kills a run waits for one of these to begin.
PHASES = {
  "step": (loader.Batches, "__next__"),
  "save": (Checkpoints, "save"),
  "commit": (Checkpoints, "_complete"),
  "digests": (storage, "write_digests"),
  "evaluation": (windows, "place"),
  "restore": (Checkpoints, "restore"),
}


def tell(log, name, function):
  """The function, each beginning of which is a line in the file `log`."""

  def telling(*arguments, **options):
    os.write(log, f"{name}\n".encode())
    return function(*arguments, **options)

  return telling


def run(job):
  log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
  os.dup2(log, 1)
  os.dup2(log, 2)
  sys.stdout = open(log, "w", closefd=False)  # noqa: SIM115
  for name, (owner, attribute) in PHASES.items():
    setattr(owner, attribute, tell(log, f"phase {name}", getattr(owner, attribute)))
  if "hangs_at" in job:
    draw = loader.Batches.__next__

    def hanging(self):
      time.sleep(600 * (self.position == job["hangs_at"]))
      return draw(self)

    loader.Batches.__next__ = hanging
  if "never_completes" in job:

    def hanging_completion(self, step):
      time.sleep(60)

    Checkpoints._complete = hanging_completion
  if "largest_file" in job:
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], job["largest_file"]))
  jax.config.update("jax_compilation_cache_dir", job["cache"])
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  return loop.train(config_lib.from_dict(job["config"]), job["workdir"])


for line in sys.stdin:
  process = os.fork()
  if not process:
    try:
      stopped_by = run(json.loads(line)).stopped_by
    except BaseException:
      traceback.print_exc()
      os._exit(1)
    os._exit(128 + stopped_by if stopped_by else 0)
  print(process, flush=True)
  print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
