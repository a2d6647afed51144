"""Measures what a look into the memories (train.probe_every) costs, in training steps.

  JAX_PLATFORMS=cpu python -m mc_jax.bench.probe --config=configs/quickstart.py

takes half a minute on one core. Steps and looks alternate and are timed in CPU time, so that other work on the machine
affects both alike. Prints the medians, and the cost of looks for several values of train.probe_every.
"""

import statistics
import time

import mc_jax.xla_flags  # noqa: F401  isort: skip  (before jax)
import jax
import numpy as np
from absl import flags

from mc_jax import cli
from mc_jax.data import windows
from mc_jax.training import config as config_lib
from mc_jax.training import stability, state, step

CONFIG = cli.config_flag()

ROUNDS = 41
EVERY = (1, 5, 10, 50)


def seconds(function, *args):
  """(CPU seconds of all threads, the function's result)."""
  begin = time.process_time()
  result = jax.block_until_ready(function(*args))
  return time.process_time() - begin, result


def main(_):
  """Times steps and looks of the configuration, and prints their medians."""
  config = config_lib.from_config_dict(CONFIG.value)
  mesh = config.make_mesh(jax.devices()[:1])
  current, update, look = state.create(config, mesh), step.lower(config, mesh).compile(), stability.probe(config, mesh)
  shapes = windows.shapes(config.data, mesh)
  batch = windows.place({name: np.ones(x.shape, x.dtype) for name, x in shapes.items()}, shapes)
  steps, looks = [], []
  for _ in range(ROUNDS):
    spent, (current, _) = seconds(update, current, batch)
    steps.append(spent)
    looks.append(seconds(look, current.params, batch)[0])
  steps, looks = statistics.median(steps[1:]), statistics.median(looks[1:])
  print(f"a step of {config.data.batch_size} rows {1e3 * steps:.1f} ms, a look {1e3 * looks:.1f} ms")
  for every in EVERY:
    print(f"train.probe_every={every}: {looks / every / steps:.1%} of a step")


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  cli.run(main, CONFIG)
