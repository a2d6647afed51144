"""The baseline mixer: causal softmax attention with rotary positions."""

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax.models.config import ModelConfig
from mc_jax.models.linear import Linear, residual_scale
from mc_jax.parallel.attention import attention


class Attention(nnx.Module):
  """Causal multi-head attention; a token attends to its own document only."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    embed = {"embed": config.d_model}
    heads = {"heads": config.heads, "head_dim": config.head_dim}
    self.rope_theta = config.rope_theta
    self.query = Linear(embed, heads, dtype=config.dtype, rngs=rngs)
    self.key = Linear(embed, heads, dtype=config.dtype, rngs=rngs)
    self.value = Linear(embed, heads, dtype=config.dtype, rngs=rngs)
    self.output = Linear(heads, embed, dtype=config.dtype, scale=residual_scale(config.layers), rngs=rngs)

  def __call__(self, x: jax.Array, document: jax.Array | None = None) -> jax.Array:
    """x [batch, length, d_model] to the same shape, in the computation's dtype.

    Args:
      document: [batch, length] int32, number of each token's document; None: a row is one.
    """
    position = jnp.arange(x.shape[1])[None] if document is None else positions(document)
    y = attention(
      rotate(self.query(x), position, self.rope_theta),
      rotate(self.key(x), position, self.rope_theta),
      self.value(x),
      document,
    )
    return self.output(y)


def positions(document: jax.Array) -> jax.Array:
  """Position of each token in its document: 0, 1, ... restarting where the number changes.

  Args:
    document: [batch, length] int32, number of each token's document.

  Returns:
    [batch, length] int32.
  """
  index = jnp.broadcast_to(jnp.arange(document.shape[1], dtype=jnp.int32), document.shape)
  previous = jnp.pad(document, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  start = jax.lax.cummax(jnp.where(document != previous, index, 0), axis=1)
  return index - start


def rotate(x: jax.Array, position: jax.Array, theta: float) -> jax.Array:
  """Rotary position embedding (arXiv:2104.09864): turns pairs of x's last axis by angles.

  Pair i of head_dim / 2 turns by position * theta^(-2 i / head_dim); computed in float32.

  Args:
    x: [batch, length, heads, head_dim], head_dim even.
    position: [batch or 1, length] int.
    theta: base of the angles.

  Returns:
    x's shape and dtype.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = position[..., None, None].astype(jnp.float32) * frequency
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
