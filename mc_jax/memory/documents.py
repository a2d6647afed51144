"""Packed documents: which tokens may know of each other.

`segment_ids` [batch, length] mark the documents packed into a row: 0 is padding, a document is a maximal run of one nonzero
id. (The name is the field's for packing; it has nothing to do with memory segments.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Documents(NamedTuple):
  """Documents of each row, by token.

  Attributes:
    number: [batch, length] int32, 1, 2, ... in order; padding carries the number of the document before it (0: none).
    valid: [batch, length] bool, False at padding.
  """

  number: jax.Array
  valid: jax.Array


def index(segment_ids: jax.Array) -> Documents:
  """Numbers the documents of each row. segment_ids [batch, length] int."""
  valid = segment_ids != 0
  before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
  starts = valid & (segment_ids != before)
  return Documents(jnp.cumsum(starts, axis=1, dtype=jnp.int32), valid)
