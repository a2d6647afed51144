"""What a look into the memories (train.probe_every) costs, in training steps.

  JAX_PLATFORMS=cpu python tests/training/probe_cost.py

takes half a minute of one core: steps and looks in turns, in CPU time, so that what else the machine does falls on both
alike. Prints the medians, and the share of the time that looks take every so many steps.
"""

import argparse
import runpy
import statistics
import time

import jax
import numpy as np

from mc_jax.data import windows
from mc_jax.training import config as config_lib
from mc_jax.training import stability, state, step

ROUNDS = 41
EVERY = (1, 5, 10, 50)


def seconds(function, *args):
  """(CPU seconds of all threads, the result)."""
  begin = time.process_time()
  result = jax.block_until_ready(function(*args))
  return time.process_time() - begin, result


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--config", default="configs/quickstart.py", help="file of the run's configuration")
  config = config_lib.from_config_dict(runpy.run_path(parser.parse_args().config)["get_config"]())
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
  main()
