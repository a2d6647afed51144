"""Measures what a cache's dtype costs: the error of the next token's answer, relative to states cached in float32.

  JAX_PLATFORMS=cpu python -m mc_jax.bench.cache_errors

prints the table in docs/inference.md. Random tokens, no trained weights: keys and queries have unit length, gates are
near their initial values, and M_0 is so large that a deep memory answers by its weights more than by its skip
connection. Everything else is float32.
"""

import functools

import jax
import numpy as np

from mc_jax import cli, memory
from mc_jax.memory import decode

AGGREGATIONS = [name for name in memory.AGGREGATIONS if name != "none"]
DTYPES = ("bfloat16", "int8")
ROWS, HEADS, HEAD_DIM, SEGMENT, SEGMENTS = 8, 2, 32, 32, 8


def errors(name: str) -> dict[str, dict[str, float]]:
  """||y - y_float32|| / ||y_float32|| of the token after SEGMENTS segments, by aggregation and dtype."""
  rule = memory.rules.get(name, chunk=16)
  shape = ROWS, SEGMENTS * SEGMENT + 1, HEADS
  rng, gate_rng = np.random.default_rng(0), np.random.default_rng(1)
  q, k, v, u = rng.normal(size=(4, *shape, HEAD_DIM))
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  gates = {
    name: gate.maximum / (1 + np.exp(-gate.bias - 0.5 * gate_rng.normal(size=shape)))
    for name, gate in rule.gate_init(SEGMENT).items()
  }
  rng.random((len(rule.gates), *shape))  # not used: M_0 stays that of the table in docs/inference.md
  shapes = jax.eval_shape(functools.partial(rule.init, heads=HEADS, head_dim=HEAD_DIM), jax.random.key(0))
  init = {name: np.float32(0.6 * rng.normal(size=w.shape)) for name, w in shapes.items()}
  x = jax.tree.map(np.float32, memory.Tokens(q, k, v, u, gates))
  prompt, token = jax.tree.map(lambda a: a[:, :-1], x), jax.tree.map(lambda a: a[:, -1:], x)

  def options(aggregation, dtype="float32"):
    return decode.Options(rule, memory.segments.constant(SEGMENT), aggregation, capacity=SEGMENTS, cache_dtype=dtype)

  @jax.jit
  def run(prompt, token):
    # States do not depend on how they are read; only ssc stores summaries.
    _, cache = decode.prefill(options("ssc"), prompt, init)

    def answer(aggregation, dtype):
      stored = cache._replace(memories=decode._store(options("ssc", dtype), cache.memories, np.float32))
      return decode.step(options(aggregation, dtype), token, init, stored)[0]

    return {name: {dtype: answer(name, dtype) for dtype in ("float32", *DTYPES)} for name in AGGREGATIONS}

  def distance(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))

  y = jax.device_get(run(prompt, token))
  return {name: {d: distance(y[name][d], y[name]["float32"]) for d in DTYPES} for name in AGGREGATIONS}


def main(_):
  """Prints the table: a row per rule and aggregation, a column per dtype."""
  print("| rule | aggregation | " + " | ".join(DTYPES) + " |")
  print("|---|---|" + "---|" * len(DTYPES))
  for rule in ("linear", "titans"):
    for aggregation, of_dtype in errors(rule).items():
      print(f"| {rule} | {aggregation} | " + " | ".join(f"{of_dtype[d]:.2%}" for d in DTYPES) + " |", flush=True)


if __name__ == "__main__":
  cli.run(main)
