"""Measures what a memory stores of a segment's pairs once its gates, M_0 and a linear readout are learned.

  JAX_PLATFORMS=cpu python -m mc_jax.bench.learned_pairs

prints a table with a row per rule and a column per size: the share of the values' variance that a linear readout of the
segment's last memory does not explain. stored_pairs.py measures a fresh memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mc_jax import cli, memory
from mc_jax.memory import rules, segments

SIZES = [(16, 16, 16, 200), (32, 64, 64, 150)]  # head_dim, chunk, segment, training steps
ROWS = {
  "titans": {},
  "titans, solve=False": {"solve": False},
  "titans, depth=1": {"depth": 1},
  "titans, depth=3": {"depth": 3},
  "titans, printed": {"normalized": False},
  "titans, printed, max_step=1": {"normalized": False, "max_step": 1.0},
  "dla": {},
  "dla, printed": {"normalized": False},
}
_BATCH, _LEARNING_RATE = 8, 1e-2


def start(rule, segment, head_dim):
  """The parameters: a logit per gate, shared by all tokens, M_0, and the readout of normalised answers."""
  gates = {name: jnp.float32(gate.bias) for name, gate in rule.gate_init(segment).items()}
  init = rule.init(jax.random.key(0), heads=1, head_dim=head_dim)
  return {"gates": gates, "init": init, "readout": 0.3 * jnp.eye(head_dim), "bias": jnp.full(head_dim, 0.2)}


def error_left(learned, key, rule, segment, head_dim):
  """Squared error of the readout over the values' variance, for `_BATCH` random segments; a scalar."""
  k, v = jax.nn.silu(jax.random.normal(key, (2, _BATCH, segment, 1, head_dim)))
  k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
  maximums = {name: gate.maximum for name, gate in rule.gate_init(segment).items()}
  idle = {"alpha": 1.0, "beta": 1.0}  # the second segment queries every pair and writes nothing

  def both(name, logit):
    value = jnp.full((_BATCH, segment, 1), maximums[name] * jax.nn.sigmoid(logit))
    return jnp.concatenate([value, jnp.full_like(value, idle.get(name, 1e-9))], 1)

  gates = {name: both(name, logit) for name, logit in learned["gates"].items()}
  k, values = (jnp.concatenate([x, x], 1) for x in (k, v))
  options = dict(rule=rule, aggregation="residual", segmentation=segments.constant(segment), carry="independent")
  y = memory.memory_caching(k, k, values, k, gates, learned["init"], implementation="xla", **options)[:, segment:]
  # `residual` adds M_0's answer to the cached memory's: subtract it.
  y -= rule.network(k[:, segment:, 0], lambda name, z: z @ learned["init"][name][0])[:, :, None]
  y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
  error = y @ learned["readout"] + learned["bias"] - v
  return jnp.square(error).sum() / jnp.square(v - v.mean((1, 2), keepdims=True)).sum()


def trained(rule, head_dim, segment, steps):
  """The error left on new segments after `steps` steps of Adam; NaN if training diverged."""
  loss = functools.partial(error_left, rule=rule, segment=segment, head_dim=head_dim)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, steps))
  )

  @jax.jit
  def step(learned, moments, key):
    updates, moments = optimizer.update(jax.grad(loss)(learned, key), moments)
    return optax.apply_updates(learned, updates), moments

  learned = start(rule, segment, head_dim)
  moments = optimizer.init(learned)
  for i in range(steps):
    learned, moments = step(learned, moments, jax.random.key(i))
  test = jax.jit(loss)
  return float(np.mean([test(learned, jax.random.key(10**6 + i)) for i in range(4)]))


def main(_):
  """Prints the table: a row per rule, a column per size."""
  sizes = [f"{d} / {chunk} / {segment}" for d, chunk, segment, _ in SIZES]
  print(f"| error left when learned | {' | '.join(sizes)} |\n|---|{'---|' * len(SIZES)}")
  for name, options in ROWS.items():
    rule_name, _, how = name.partition(", ")
    cells = (trained(rules.get(rule_name, chunk=c, **options), d, s, steps) for d, c, s, steps in SIZES)
    print(f"| `{rule_name}`{how and f', {how}'} | {' | '.join(f'{cell:.2f}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
  cli.run(main)
