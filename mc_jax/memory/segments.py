"""Segmentation: where a sequence is cut, and a memory cached (arXiv:2602.24281, section 4.2)."""

import dataclasses
import itertools
from typing import ClassVar

import numpy as np


@dataclasses.dataclass(frozen=True)
class Constant:
  """Segments of `length` tokens; the last may be shorter. N = ceil(L / length), O(L^2 / length) in all.

  Attributes:
    length: in tokens.
    extends: whether a longer sequence is cut at the same places as far as they go, so that sequences of unknown length
      can be decoded, and documents of several lengths packed into a row.
  """

  extends: ClassVar[bool] = True

  length: int

  def lengths(self, sequence_length: int) -> tuple[int, ...]:
    """The segments' lengths, first to last; they add up to sequence_length."""
    full, rest = divmod(sequence_length, self.length)
    return (self.length,) * full + (rest,) * (rest > 0)


@dataclasses.dataclass(frozen=True)
class Logarithmic:
  """Powers of two from the binary expansion of the length, largest first: 37 is cut into 32, 4, 1. O(L log L) in all.

  The cut depends on the sequence's length, so the outputs of a prefix are not a prefix of the outputs.
  """

  extends: ClassVar[bool] = False

  def lengths(self, sequence_length: int) -> tuple[int, ...]:
    """The segments' lengths, first to last; they add up to sequence_length."""
    bits = range(sequence_length.bit_length() - 1, -1, -1)
    return tuple(1 << bit for bit in bits if sequence_length >> bit & 1)


Segmentation = Constant | Logarithmic
NAMES = ("constant", "logarithmic")


def constant(length: int) -> Constant:
  """Segments of `length` tokens. Raises ValueError if it is not positive."""
  if length < 1:
    raise ValueError(f"segment length must be at least 1 token, got {length}")
  return Constant(length)


def logarithmic() -> Logarithmic:
  """Segments of decreasing powers of two."""
  return Logarithmic()


def divides(segmentation: Segmentation, sequence_length: int, parts: int) -> bool:
  """Whether a sequence is cut into segments of one length whose number is a multiple of `parts`."""
  lengths = segmentation.lengths(sequence_length)
  return len(set(lengths)) <= 1 and len(lengths) % parts == 0


def runs(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
  """(length, count) of each run of equal segments: what one `jax.lax.scan` can walk."""
  return [(length, len(list(group))) for length, group in itertools.groupby(lengths)]


def index(lengths: tuple[int, ...]) -> np.ndarray:
  """The segment of every token: [sequence_length] int32."""
  return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


def tiles(lengths: tuple[int, ...], at_least: int) -> tuple[int, ...]:
  """Lengths of query tiles: neighbouring segments put together until they have at least so many tokens."""
  sizes, size = [], 0
  for i, length in enumerate(lengths):
    size += length
    if size >= at_least or i == len(lengths) - 1:
      sizes.append(size)
      size = 0
  return tuple(sizes)
