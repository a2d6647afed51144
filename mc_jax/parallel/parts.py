"""A sequence cut into equal parts of whole segments, one on each device along a mesh axis."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mc_jax.memory.arithmetic import state_dtype


class Parts(NamedTuple):
  """The parts of a sequence along a mesh axis; inside `jax.shard_map`, where each device sees its own.

  Attributes:
    count: the number of parts.
    axis: the mesh axis.
    buffer: bytes that a device gathers from others at a time, to read; at least one state of each is.
  """

  count: int
  axis: str
  buffer: int

  def index(self) -> jax.Array:
    """The index of this device's part, int32."""
    return lax.axis_index(self.axis)

  def gather(self, x: jax.Array) -> jax.Array:
    """Everyone's x, [n, ...] to [count * n, ...]."""
    return lax.all_gather(x, self.axis, tiled=True)

  def ahead(self, x: jax.Array, by: int = 1) -> jax.Array:
    """What the part `by` before this one has; zeros in the first parts."""
    return lax.ppermute(x, self.axis, [(i, i + by) for i in range(self.count - by)])

  def back(self, x: jax.Array, by: int = 1) -> jax.Array:
    """What the part `by` after this one has; zeros in the last parts."""
    return lax.ppermute(x, self.axis, [(i + by, i) for i in range(self.count - by)])

  def mirrored(self, x: jax.Array, axis: int) -> jax.Array:
    """x whose second half along an array axis is swapped with that of the part as far from the other end.

    Early parts have little behind them to read, late ones much: with a late part's end in exchange for its own every
    part has the same. The halves stay in the sequence's order.
    """
    low, high = jnp.split(x, 2, axis)
    high = lax.ppermute(high, self.axis, [(i, self.count - 1 - i) for i in range(self.count)])
    return jnp.where(self._early(), jnp.concatenate([low, high], axis), jnp.concatenate([high, low], axis))

  def unmirrored(self, x: jax.Array, axis: int) -> jax.Array:
    """The inverse of `mirrored`."""
    first, second = jnp.split(x, 2, axis)
    low, high = jnp.where(self._early(), first, second), jnp.where(self._early(), second, first)
    high = lax.ppermute(high, self.axis, [(i, self.count - 1 - i) for i in range(self.count)])
    return jnp.concatenate([low, high], axis)

  def halves(self) -> np.ndarray:
    """Which halves `mirrored` puts together on each part: [count, 2] int, in units of half a part."""
    own = np.arange(self.count)
    return np.sort(np.stack([2 * own, 2 * (self.count - 1 - own) + 1], 1), axis=1)

  def _early(self) -> jax.Array:
    return 2 * self.index() < self.count


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_rounded(x: jax.Array, axis: str, dtype: jnp.dtype) -> jax.Array:
  """Everyone's x, [count, *x.shape], sent in `dtype`; the gradient is added up in float32 at least."""
  return lax.all_gather(x.astype(dtype), axis)


def _gather_forward(x, axis, dtype):
  return gather_rounded(x, axis, dtype), jnp.empty((0,), x.dtype)


def _gather_backward(axis, dtype, like, cotangent):
  return (lax.psum_scatter(cotangent.astype(state_dtype(dtype)), axis).astype(like.dtype),)


gather_rounded.defvjp(_gather_forward, _gather_backward)


def largest_divisor(n: int, at_most: float, multiple_of: int = 1) -> int:
  """The largest divisor of n up to a bound (1 if none), a multiple of something if there is such a one."""
  divisors = [i for i in range(1, n + 1) if n % i == 0 and i <= max(1, at_most)]
  return max([i for i in divisors if i % multiple_of == 0] or divisors)


def nbytes(arrays: Sequence[jax.Array], dtype: jnp.dtype) -> int:
  """Bytes of arrays in a dtype."""
  return sum(x.size for x in arrays) * jnp.dtype(dtype).itemsize
