"""Rotary positions: each token's place in its document, as angles."""

import jax
import jax.numpy as jnp


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
