"""Packed documents: which tokens may know of each other.

`segment_ids` [batch, length] mark the documents packed into a row: 0 is padding, a document is a maximal run of one
nonzero id. (The name is the field's for packing; it has nothing to do with memory segments.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Documents(NamedTuple):
  """Documents of each row, by token; any leading and middle axes, length last.

  Attributes:
    number: int32, 1, 2, ... in order; padding carries the number of the document before it (0: none).
    before: int32, the number at the token before (0 at the row's start): whose state comes in.
    valid: bool, False at padding.
  """

  number: jax.Array
  before: jax.Array
  valid: jax.Array


def index(segment_ids: jax.Array) -> Documents:
  """Numbers the documents of each row. segment_ids [batch, length] int; the result's arrays have the same shape.

  Raises:
    ValueError: they are no integers.
  """
  if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
    raise ValueError(f"segment_ids must be integers [batch, length]; got {segment_ids.dtype} {segment_ids.shape}")
  valid = segment_ids != 0
  starts = valid & (segment_ids != _shift(segment_ids))
  number = jnp.cumsum(starts, axis=-1, dtype=jnp.int32)
  return Documents(number, _shift(number), valid)


def _shift(x: jax.Array) -> jax.Array:
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 0)])[..., :-1]


class Visible(NamedTuple):
  """Who sees whom inside a chunk of T tokens.

  A window over the last tokens has J = T + window - 1 keys: the chunk's, then those of the tokens before it.

  Attributes:
    same: [..., T, T] bool, row t sees column j: j <= t, of the same document, j not padding.
    reach: [..., T, J] bool, the same for the keys of a window.
    last: [..., 1, J] bool, reach's last row.
    incoming: [..., T, 1] bool, the token's document came in from before the chunk; None without documents: all did.
    keys_incoming: [..., J, 1] bool, the key's did; None without documents.
    continues: [..., 1, 1] bool, the last token's did; None without documents.
  """

  same: jax.Array
  reach: jax.Array
  last: jax.Array
  incoming: jax.Array | None
  keys_incoming: jax.Array | None
  continues: jax.Array | None


def visible(documents: Documents | None, length: int, window: int = 1) -> Visible:
  """Who sees whom inside a chunk of `length` tokens. documents: arrays [..., length]."""
  # Numbers are compared where they are wanted: Mosaic moves integers between rows and columns, not masks.
  keys = length + window - 1
  rows = jax.lax.broadcasted_iota(jnp.int32, (length, keys), 0)
  reach, last = rows >= positions(length, keys), jnp.ones((1, keys), bool)
  same = rows[:, :length] >= positions(length, length)
  if documents is None:
    return Visible(same, reach, last, None, None, None)
  number, first = documents.number, documents.before[..., :1]
  owner = jnp.where(documents.valid, number, -1)
  earlier = jnp.broadcast_to(first, (*first.shape[:-1], window - 1))
  key_number, key_owner = (jnp.concatenate([x, earlier], -1) if window > 1 else x for x in (number, owner))
  return Visible(
    same & (number[..., :, None] == owner[..., None, :]),
    reach & (number[..., :, None] == key_owner[..., None, :]),
    number[..., -1:, None] == key_owner[..., None, :],
    number[..., :, None] == first[..., None],
    key_number[..., :, None] == first[..., None],
    number[..., -1:, None] == first[..., None],
  )


def earlier(seen: Visible) -> jax.Array:
  """`seen.same` of the tokens before, [..., T, T] bool."""
  row, column = (jax.lax.broadcasted_iota(jnp.int32, seen.same.shape[-2:], axis) for axis in (0, 1))
  return seen.same & (row > column)


def positions(length: int, keys: int) -> jax.Array:
  """Where in the chunk a window's keys are, [1, keys] int32; those from before it have negative positions."""
  column = jax.lax.broadcasted_iota(jnp.int32, (1, keys), 1)
  return jnp.where(column < length, column, column - keys)
