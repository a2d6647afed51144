"""The short causal convolution that gives q, k and v their nearest neighbours."""

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax.models.linear import fan_in, parameter


class CausalConvolution(nnx.Module):
  """Depthwise: y_t = sum_{j < width} kernel_j * x_{t-j} + bias, over tokens of t's own document.

  A sum of shifted products: each is elementwise, so the whole fuses, and the mask between packed
  documents is one comparison per shift.

  Args:
    channels: name and size of x's axes after [batch, length].
    width: tokens that a token sees, itself included.
    bias: whether there is one; it starts at 0.
  """

  def __init__(self, channels: dict[str, int], width: int, *, bias: bool = False, rngs: nnx.Rngs):
    self.width = width
    self.kernel = parameter(fan_in(1, 0), (width, *channels.values()), ("conv_width", *channels), rngs)
    if bias:
      self.bias = parameter(jax.nn.initializers.zeros, tuple(channels.values()), channels, rngs)

  def __call__(self, x: jax.Array, document: jax.Array | None = None, before: jax.Array | None = None) -> jax.Array:
    """Convolves x [batch, length, *channels], in x's dtype.

    Args:
      document: [batch, length] int32, number of each token's document; None: a row is one.
      before: [batch, width - 1, *channels], the tokens before x, of the same document (`tail`); None: there are none.
    """
    if before is not None:
      return self(jnp.concatenate([before, x], axis=1))[:, self.width - 1 :]
    kernel = self.kernel[...].astype(x.dtype)
    y = kernel[0] * x
    for distance in range(1, self.width):
      earlier = _shift(x, distance)
      if document is not None:
        same = document == _shift(document, distance)
        earlier = jnp.where(same.reshape(same.shape + (1,) * (x.ndim - 2)), earlier, 0)
      y += kernel[distance] * earlier
    return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y

  def tail(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """The last width - 1 tokens of x [batch, length, *channels], zeros where there are none.

    Args:
      lengths: [batch] int, tokens of each row; None: all of them.
    """
    lengths = jnp.full(len(x), x.shape[1]) if lengths is None else lengths
    padded = jnp.pad(x, [(0, 0), (self.width - 1, 0)] + [(0, 0)] * (x.ndim - 2))
    place = lengths[:, None] + jnp.arange(self.width - 1)
    return jnp.take_along_axis(padded, place.reshape(*place.shape, *[1] * (x.ndim - 2)), axis=1)


def _shift(x, distance):
  """x[:, t - distance] at t; zeros before the row's start."""
  padding = [(0, 0)] * x.ndim
  padding[1] = (distance, 0)
  return jnp.pad(x, padding)[:, : x.shape[1]]
