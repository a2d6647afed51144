"""The gates of a memory rule, from tokens: retention, momentum, step sizes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax.memory.rules import Rule
from mc_jax.models.linear import Linear, parameter
from mc_jax.models.published_gates import Parametrisation, Sizes
from mc_jax.parallel import axes

# Of the logits around their bias when training begins. The starting values are a matter of life
# and death for a memory (see memory/rules/gradient.py), so that tokens may differ but little at first.
SPREAD = 0.1


class TokenGates(nnx.Module):
  """value = maximum * sigmoid(<x_t, w> + bias), in float32: of every gate and head, or of every channel of the head.

  Args:
    rule: whose gates they are.
    segment_length: in tokens; the gates' starting values depend on it.
    d_model, heads, head_dim: the layer's widths.
    published: how gates are made that are made otherwise, as far as the rule has them.
  """

  def __init__(
    self,
    rule: Rule,
    segment_length: int,
    d_model: int,
    heads: int,
    head_dim: int,
    published: Sequence[Parametrisation] = (),
    *,
    rngs: nnx.Rngs,
  ):
    starts = rule.gate_init(segment_length)
    self.names = tuple(starts)
    published = [how for how in published if how.gate in starts]
    # By channel and by head parameters have other axes, and so other names.
    self.published = tuple(f"channel_{how.gate}" if rule.gates[how.gate].per_channel else how.gate for how in published)
    for module, how in zip(self.published, published, strict=True):
      sizes = Sizes(d_model, heads, head_dim, rule.gates[how.gate].per_channel, starts[how.gate].maximum)
      setattr(self, module, how.build(sizes, rngs=rngs))
    made = {name for how in published for name in how.makes}
    starts = {name: start for name, start in starts.items() if name not in made}
    self.maximums = tuple((name, start.maximum) for name, start in starts.items())
    self.per_head = tuple(name for name in starts if not rule.gates[name].per_channel)
    self.per_channel = tuple(name for name in starts if rule.gates[name].per_channel)
    if self.per_head:
      outputs = {"gate": len(self.per_head), "gate_heads": heads}
      self.linear = Linear({"embed": d_model}, outputs, scale=SPREAD, rngs=rngs)
      self.bias = _biases([starts[name].bias for name in self.per_head], outputs, rngs)
    if self.per_channel:
      outputs = {"gate": len(self.per_channel), "gate_heads": heads, "head_dim": head_dim}
      self.channel_linear = Linear({"embed": d_model}, outputs, scale=SPREAD, rngs=rngs)
      self.channel_bias = _biases([starts[name].bias for name in self.per_channel], outputs, rngs)

  def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
    """x [batch, length, d_model] to {gate: [batch, length, heads] or [..., head_dim]} float32, activated."""
    # Of all heads everywhere: they are few, and their gradient in x then needs no sum over the mesh.
    values = {}
    if self.per_head:
      logits = axes.constrain(self.linear(x), (*axes.TOKENS, None, None)) + self.bias[...]
      values |= {name: logits[:, :, i] for i, name in enumerate(self.per_head)}
    if self.per_channel:
      logits = axes.constrain(self.channel_linear(x), (*axes.TOKENS, None, None, None)) + self.channel_bias[...]
      values |= {name: logits[:, :, i] for i, name in enumerate(self.per_channel)}
    values = {name: most * jax.nn.sigmoid(values[name]) for name, most in self.maximums}
    for module in self.published:
      values |= getattr(self, module)(x)
    return {name: values[name] for name in self.names}


def _biases(starts: list[float], outputs: dict[str, int], rngs: nnx.Rngs) -> nnx.Param:
  """Every gate's bias, the same for all heads and channels when training begins."""
  biases = jnp.asarray(starts, jnp.float32).reshape(-1, *[1] * (len(outputs) - 1))
  shape = tuple(outputs.values())
  return parameter(lambda key, shape, dtype: jnp.broadcast_to(biases, shape).astype(dtype), shape, tuple(outputs), rngs)
