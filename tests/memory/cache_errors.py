"""What a cache's dtype costs: the error of the next token's answer, against states cached in float32.

`python tests/memory/cache_errors.py` prints the table in docs/inference.md. Random tokens, no trained weights: keys and
queries of unit length, gates near where they start in training, and M_0 so large that a deep memory answers by its
weights more than by its skip connection. All else is float32.
"""

import jax
import numpy as np
import samples

from mc_jax import memory
from mc_jax.memory import decode

AGGREGATIONS = [name for name in memory.AGGREGATIONS if name != "none"]
DTYPES = ("bfloat16", "int8")
ROWS, HEADS, HEAD_DIM, SEGMENT, SEGMENTS = 8, 2, 32, 32, 8


def errors(name: str) -> dict[str, dict[str, float]]:
  """||y - y_float32|| / ||y_float32|| of the token after SEGMENTS segments, by aggregation and dtype."""
  rule = memory.rules.get(name, chunk=16)
  x = samples.inputs(rule, batch=ROWS, length=SEGMENTS * SEGMENT + 1, heads=HEADS, head_dim=HEAD_DIM)
  rng = np.random.default_rng(1)
  gates = {
    name: gate.maximum / (1 + np.exp(-gate.bias - 0.5 * rng.normal(size=x.gates[name].shape)))
    for name, gate in rule.gate_init(SEGMENT).items()
  }
  x = jax.tree.map(np.float32, x._replace(gates=gates, q=x.q / np.linalg.norm(x.q, axis=-1, keepdims=True)))
  prompt, token = (samples.map_tokens(lambda a: a[:, part], x) for part in (slice(-1), slice(-1, None)))

  def options(aggregation, dtype="float32"):
    return decode.Options(rule, memory.segments.constant(SEGMENT), aggregation, capacity=SEGMENTS, cache_dtype=dtype)

  @samples.jit
  def run(prompt, token):
    # The states are the same however they are read; ssc has summaries, too.
    _, cache = decode.prefill(options("ssc"), prompt.tokens(), prompt.init)

    def answer(aggregation, dtype):
      stored = cache._replace(memories=decode._store(options("ssc", dtype), cache.memories, np.float32))
      return decode.step(options(aggregation, dtype), token.tokens(), token.init, stored)[0]

    return {name: {dtype: answer(name, dtype) for dtype in ("float32", *DTYPES)} for name in AGGREGATIONS}

  def distance(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))

  found = jax.device_get(run(prompt, token))
  return {name: {d: distance(found[name][d], found[name]["float32"]) for d in DTYPES} for name in AGGREGATIONS}


if __name__ == "__main__":
  print("| rule | aggregation | " + " | ".join(DTYPES) + " |")
  print("|---|---|" + "---|" * len(DTYPES))
  for rule in ("linear", "titans"):
    for aggregation, found in errors(rule).items():
      print(f"| {rule} | {aggregation} | " + " | ".join(f"{found[d]:.2%}" for d in DTYPES) + " |", flush=True)
