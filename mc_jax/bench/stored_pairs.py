"""Measures what a fresh memory with its initial gates stores of a segment's pairs: the share written, the error left.

  JAX_PLATFORMS=cpu python -m mc_jax.bench.stored_pairs

prints the table of docs/writing.md in a minute. "One key" is the worst case: the same key with many values.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mc_jax import cli, memory
from mc_jax.memory import rules, segments

SIZES = [(256, 256, 256), (32, 64, 64), (8, 4, 4), (64, 64, 256)]  # head_dim, chunk, segment


def unit(x):
  """Vectors of length 1, along the last axis."""
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pairs(head_dim, count, repeated=False):
  """Keys and values as in a layer, SiLU of normal numbers, keys of unit length: [1, count, 1, head_dim] each."""
  rng = np.random.default_rng(0)
  k, v = (x / (1 + np.exp(-x)) for x in rng.normal(size=(2, 1, count, 1, head_dim)))
  k = np.repeat(k[:, :1], count, 1) if repeated else k
  return unit(k).astype(np.float32), v.astype(np.float32)


def written(rule, segment, k, v):
  """(share of the pairs' errors that one segment writes, error that it leaves), as memory_caching reads them.

  The next segment queries every pair and writes nothing. With `residual` it reads M_0 and the cached memory.
  """
  init = jax.jit(functools.partial(rule.init, heads=1, head_dim=k.shape[-1]))(jax.random.key(0))
  starts = rule.starting_gates(segment)
  idle = {gate: {"alpha": 1.0, "beta": 1.0}.get(gate, 1e-9) for gate in starts}

  @jax.jit
  def read(k, v, init):
    gates = {g: jnp.full((1, 2 * segment, 1), starts[g]).at[:, segment:].set(idle[g]) for g in starts}
    k, v = (jnp.concatenate([x, x], 1) for x in (k, v))
    options = dict(rule=rule, aggregation="residual", segmentation=segments.constant(segment), carry="independent")
    y = memory.memory_caching(k, k, v, k, gates, init, implementation="xla", **options)[:, segment:]
    before = rule.network(k[0, segment:, 0], lambda name, z: z @ init[name][0])
    return y[0, :, 0] - before, before

  after, before = jax.device_get(read(k, v, init))
  error = v[0, :, 0] - before
  return np.sum((after - before) * error) / np.sum(error**2), np.sum((v[0, :, 0] - after) ** 2) / np.sum(error**2)


ROWS = {
  "titans": {},
  "titans, solve=False": {"solve": False},
  "titans, printed": {"normalized": False},
  "titans, printed, max_step=1": {"normalized": False, "max_step": 1.0},
  "dla": {},
  "dla, printed": {"normalized": False},
}


def main(_):
  """Prints the table: a row per rule, a column per size."""
  sizes = [" / ".join(map(str, size)) for size in SIZES]
  print(f"| written (error left; one key) | {' | '.join(sizes)} |\n|---|{'---|' * len(SIZES)}")
  for name, options in ROWS.items():
    rule_name, _, how = name.partition(", ")
    cells = []
    for head_dim, chunk, segment in SIZES:
      rule = rules.get(rule_name, chunk=chunk, **options)
      share, left = written(rule, segment, *pairs(head_dim, segment))
      _, worst = written(rule, segment, *pairs(head_dim, segment, repeated=True))
      cells.append(f"{share:.2g} ({left:.2g}; {worst:.2g})")
    print(f"| `{rule_name}`{how and f', {how}'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  cli.run(main)
