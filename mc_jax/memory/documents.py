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
  """Numbers the documents of each row. segment_ids [batch, length] int; the result's arrays have the same shape."""
  valid = segment_ids != 0
  starts = valid & (segment_ids != _shift(segment_ids))
  number = jnp.cumsum(starts, axis=-1, dtype=jnp.int32)
  return Documents(number, _shift(number), valid)


def _shift(x: jax.Array) -> jax.Array:
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 0)])[..., :-1]


class Visible(NamedTuple):
  """Who sees whom inside a chunk of T tokens.

  Attributes:
    same: [..., T, T] bool, row t sees column j: j <= t, of the same document, j not padding.
    reach: [..., T, J] bool, the same for the J = window - 1 + T keys that a window over the last tokens has.
    incoming: [..., T] bool, the token's document came in from before the chunk; None without documents: all did.
  """

  same: jax.Array
  reach: jax.Array
  incoming: jax.Array | None


def visible(documents: Documents | None, length: int, window: int = 1) -> Visible:
  """Who sees whom inside a chunk of `length` tokens. documents: arrays [..., length]."""
  rows = jax.lax.broadcasted_iota(jnp.int32, (length, length), 0)
  columns = jax.lax.broadcasted_iota(jnp.int32, (length, length), 1)
  same, incoming = rows >= columns, None
  if documents is not None:
    number = documents.number
    same &= (number[..., :, None] == number[..., None, :]) & documents.valid[..., None, :]
    incoming = number == documents.before[..., :1]
  if window == 1:
    return Visible(same, same, incoming)
  earlier = jnp.ones((length, 1), bool) if incoming is None else incoming[..., None]
  reach = jnp.concatenate([jnp.broadcast_to(earlier, (*same.shape[:-1], window - 1)), same], -1)
  return Visible(same, reach, incoming)
