"""Cached states in host memory, which a compiled step writes and fetches one by one.

The matrices of a state lie in a page, [rows, 128] of whole tiles, int8 four to an int32. Then XLA has one layout to
choose; arrays of matrices have two, and it copies all of an array, to the device and back, from the one in which
programs are given it to the one that loops prefer.

Slots are arrays [n, batch, heads, *page], cut along one axis, which makes every cut a DMA. Loops must carry them: of
what they are given slice by slice (xs), and of what `lax.cond` chooses, XLA makes copies.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pytree = Any

LANES = 128
_UNROLLED = 64  # fetches under way at once; more take longer to compile, 0.1 s each
_GROUP = 32  # of more, so many at a time


def pack(matrices: Mapping[str, jax.Array]) -> jax.Array:
  """Matrices [..., in, out] of one dtype as pages [..., rows, 128] of that dtype, or of int32 for int8."""
  # Sorted as jit sorts them: what was packed inside a loop may be unpacked outside.
  x = jnp.concatenate([_in_rows(matrices[name]) for name in sorted(matrices)], axis=-2)
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % _tile(x.dtype)), (0, 0)])
  if x.dtype != jnp.int8:
    return x
  a, b, c, d = jnp.split(x.astype(jnp.int32) & 0xFF, 4, axis=-2)
  return a | b << 8 | c << 16 | d << 24


def unpack(pages: jax.Array, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """The matrices that were packed, [..., *shape] of these names, shapes and dtype, from pages [..., rows, 128]."""
  if next(iter(like.values())).dtype == jnp.int8:
    pages = jnp.concatenate([(pages << shift >> 24).astype(jnp.int8) for shift in (24, 16, 8, 0)], axis=-2)
  matrices, start = {}, 0
  for name, w in sorted(like.items()):
    size = math.prod(w.shape)
    rows = -(-size // LANES)
    flat = pages[..., start : start + rows, :].reshape(*pages.shape[:-2], rows * LANES)
    matrices[name] = flat[..., :size].reshape(*pages.shape[:-2], *w.shape)
    start += rows
  return matrices


def to_host(x: jax.Array) -> jax.Array:
  """x in host memory; under jit."""
  return jax.device_put(x, jax.memory.Space.Host)


def write(slots: Pytree, slot: jax.Array, rows: jax.Array, new: Callable[[jax.Array], Pytree]) -> Pytree:
  """The slots, of which some rows have written one each, in place.

  Args:
    slots: leaves [n, batch, heads, ...], in host or device memory.
    slot: [batch] int32, which one.
    rows: [batch] bool, who writes. As many turns of a loop as there are such rows, which mostly is none.
    new: what the row b writes: leaves [heads, ...].
  """
  order = jnp.argsort(~rows)  # those who write, then the others

  def put(i, slots):
    b = order[i]

    def at(w, x):
      flat = w.reshape(-1, *w.shape[3:])
      x = jax.device_put(x, jax.typeof(w).memory_space)
      flat = lax.dynamic_update_slice_in_dim(flat, x, (slot[b] * w.shape[1] + b) * w.shape[2], 0)
      return flat.reshape(w.shape)

    return jax.tree.map(at, slots, new(b))

  return lax.fori_loop(0, rows.sum(), put, slots)


def fetch(slots: jax.Array, slot: jax.Array) -> jax.Array:
  """On the device, from slots [n, batch, heads, *page]: of each row and head the page slot [batch, heads] int32."""
  batch, heads = slot.shape
  flat = slots.reshape(-1, *slots.shape[3:])
  index = ((slot * batch + jnp.arange(batch)[:, None]) * heads + jnp.arange(heads)).reshape(-1)

  def take(index):
    found = [lax.dynamic_slice_in_dim(flat, i, 1) for i in index]
    return jnp.concatenate([jax.device_put(page, jax.memory.Space.Device) for page in found])

  if len(index) <= _UNROLLED:
    found = take(index)
  else:
    groups = jnp.pad(index, (0, -len(index) % _GROUP), mode="edge").reshape(-1, _GROUP)
    found = lax.map(take, groups).reshape(-1, *flat.shape[1:])[: len(index)]
  return found.reshape(batch, heads, *flat.shape[1:])


@functools.partial(jax.jit, static_argnums=1)
def repeat(slots: jax.Array, times: int) -> jax.Array:
  """Slots in host memory whose rows are each repeated so many times, one slot after the other."""

  def of_slot(i, _):
    slot = jax.device_put(lax.dynamic_slice_in_dim(slots, i, 1)[0], jax.memory.Space.Device)
    return i + 1, to_host(jnp.repeat(slot, times, axis=0))

  return lax.scan(of_slot, 0, length=len(slots))[1]


def _tile(dtype: jnp.dtype) -> int:
  """Rows that make whole tiles on a TPU."""
  return max(8, 32 // dtype.itemsize)


def _in_rows(w: jax.Array) -> jax.Array:
  """Matrices [..., in, out] as [..., rows, 128], the last row filled up."""
  flat = w.reshape(*w.shape[:-2], -1)
  flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % LANES)])
  return flat.reshape(*w.shape[:-2], -1, LANES)
