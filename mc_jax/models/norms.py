"""Normalisation, computed in float32 whatever the computation's dtype."""

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax.models.linear import parameter

EPSILON = 1e-6


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps) * scale over the last axis; the output has x's dtype.

  `axes` names the axes of the scale, which are x's last ones: {"embed": d_model}, or
  {"heads": heads, "head_dim": head_dim} for a norm of each head with a scale of its own. The scale
  begins at `start`. With `groups`, heads are split into that many groups, and the mean is over a group's channels.
  """

  def __init__(self, axes: dict[str, int], start: float = 1.0, *, groups: int | None = None, rngs: nnx.Rngs):
    self.groups = groups
    self.scale = parameter(jax.nn.initializers.constant(start), tuple(axes.values()), axes, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    if self.groups is None:
      mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    else:
      by_head = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
      by_group = by_head.reshape(*x.shape[:-2], self.groups, -1, 1).mean(-2, keepdims=True)
      mean_square = jnp.repeat(by_group[..., 0, :], x.shape[-2] // self.groups, axis=-2)
    return (x32 * jax.lax.rsqrt(mean_square + EPSILON) * self.scale[...]).astype(x.dtype)


class LayerNorm(RMSNorm):
  """RMSNorm of x less its mean: layer normalisation without a bias."""

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return super().__call__(x32 - x32.mean(-1, keepdims=True)).astype(x.dtype)


def l2_normalize(x: jax.Array) -> jax.Array:
  """x / |x| over the last axis, in x's dtype; a zero vector stays zero and its gradient finite."""
  x32 = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(x32), axis=-1, keepdims=True)
  return (x32 * jax.lax.rsqrt(square + EPSILON)).astype(x.dtype)
