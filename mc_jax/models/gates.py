"""The per-token scalars of a memory rule: retention, momentum, step sizes."""

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax.memory.rules import GateInit
from mc_jax.models.linear import Linear, parameter
from mc_jax.parallel import axes

# Of the logits around their bias when training begins. The starting values are a matter of life
# and death for a memory (see memory/rules.py), so that tokens may differ but little at first.
SPREAD = 0.1


class TokenGates(nnx.Module):
  """value = maximum * sigmoid(<x_t, w> + bias) for every gate and head, in float32.

  Args:
    starts: bias and maximum of each gate, from `rule.gate_init`.
  """

  def __init__(self, starts: dict[str, GateInit], d_model: int, heads: int, *, rngs: nnx.Rngs):
    self.maximums = tuple((name, start.maximum) for name, start in starts.items())
    self.linear = Linear({"embed": d_model}, {"gate": len(starts), "gate_heads": heads}, scale=SPREAD, rngs=rngs)
    biases = jnp.asarray([start.bias for start in starts.values()], jnp.float32)
    self.bias = parameter(
      lambda key, shape, dtype: jnp.broadcast_to(biases[:, None], shape).astype(dtype),
      (len(starts), heads),
      ("gate", "gate_heads"),
      rngs,
    )

  def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
    """x [batch, length, d_model] to {gate: [batch, length, heads]} float32, activated."""
    # Of all heads everywhere: they are few, and their gradient in x then needs no sum over the mesh.
    logits = axes.constrain(self.linear(x), (*axes.TOKENS, None, None))
    values = jax.nn.sigmoid(logits + self.bias[...])
    return {name: most * values[:, :, i] for i, (name, most) in enumerate(self.maximums)}
