"""Times weighted sums of a table's rows, forward alone and with the gradients, beside torch's embedding_bag in turns.

    OMP_WAIT_POLICY=passive JAX_PLATFORMS=cpu python -m mc_jax.bench.values      # --notorch if it is not installed

Without OMP_WAIT_POLICY torch's threads spin for a while after each call, on the cores that the other needs.

A table of 1M x 256 float32, 128 rows a token, uniformly drawn. Both libraries are in one process and take turns; the
medians of 5 and their ratios are printed. The gradient in the table is dense: a table of it is written each time.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from mc_jax.models import value_table

_ROWS = flags.DEFINE_integer("rows", 1 << 20, "Rows of the table.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 256, "Width of a row.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 2048, "Tokens.", lower_bound=1)
_HITS = flags.DEFINE_integer("hits", 128, "Rows that a token reads.", lower_bound=1)
_TORCH = flags.DEFINE_bool("torch", True, "Whether to time torch's embedding_bag, too.")


def ours(values, rows, weights, cotangent):
  """(forward, forward and backward) as functions without arguments that wait for their results."""
  arrays = jnp.asarray(values), jnp.asarray(rows, jnp.int32)[:, None], jnp.asarray(weights)[:, None]
  forward = jax.jit(value_table.read)

  @jax.jit
  def both(values, rows, weights, cotangent):
    y, back = jax.vjp(lambda values, weights: value_table.read(values, rows, weights), values, weights)
    return y, back(cotangent)

  cotangent = jnp.asarray(cotangent)
  return lambda: jax.block_until_ready(forward(*arrays)), lambda: jax.block_until_ready(both(*arrays, cotangent))


def torchs(values, rows, weights, cotangent):
  """The same of torch's embedding_bag."""
  import torch

  values, weights = torch.tensor(values, requires_grad=True), torch.tensor(weights, requires_grad=True)
  rows, cotangent = torch.tensor(rows, dtype=torch.int64), torch.tensor(cotangent)

  def read():
    return torch.nn.functional.embedding_bag(rows, values, per_sample_weights=weights, mode="sum")

  def forward():
    with torch.no_grad():
      read()

  def both():
    values.grad = weights.grad = None
    read().backward(cotangent)

  return forward, both


def main(_) -> None:
  """Prints the times."""
  rng = np.random.default_rng(0)
  values = rng.standard_normal((_ROWS.value, _WIDTH.value), np.float32)
  rows = rng.integers(0, _ROWS.value, (_TOKENS.value, _HITS.value))
  weights = rng.random(rows.shape, np.float32)
  cotangent = rng.standard_normal((_TOKENS.value, _WIDTH.value), np.float32)
  libraries = {"mc_jax": ours, "torch": torchs} if _TORCH.value else {"mc_jax": ours}
  calls = {name: make(values, rows, weights, cotangent) for name, make in libraries.items()}
  for what, index in (("forward", 0), ("forward and backward", 1)):
    times = {name: [] for name in calls}
    for _ in range(6):  # the first warms up
      for name, functions in calls.items():
        begin = time.perf_counter()
        functions[index]()
        times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(each[1:]) for name, each in times.items()}
    shown = ", ".join(f"{name} {1e3 * seconds:,.1f} ms" for name, seconds in medians.items())
    ratio = f"; torch / mc_jax {medians['torch'] / medians['mc_jax']:.2f}" if "torch" in medians else ""
    print(f"{what}: {shown}{ratio}")


if __name__ == "__main__":
  app.run(main)
