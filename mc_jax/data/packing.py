"""Documents packed into rows.

A document of ids d_0 .. d_n (separators at both ends) gives n places: at place i the token d_i, whose target is
d_(i+1). A piece is a stretch of them. A row holds pieces of one or more documents, each under a segment id of its own,
1, 2, ... from left to right; 0 is padding, in the gaps that alignment leaves and at the row's end. Nothing crosses from
piece to piece. (Positions count from each piece's start: models derive them from segment_ids.)
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mc_jax.data.config import PackingConfig

Row = dict[str, np.ndarray]
# Number of a document, from 0 -> its ids, int32 [n + 1] or none at all; None where there are no more documents.
Read = Callable[[int], np.ndarray | None]


class Piece(NamedTuple):
  """Places `start` .. `stop` - 1 of a document."""

  ids: np.ndarray  # of the whole document, int32 [n + 1]
  start: int
  stop: int


class Cursor(NamedTuple):
  """Where a stream of rows is. What follows is a function of it."""

  document: int  # the next rows are filled together: with this document first,
  place: int  # from this place on;
  rows: int  # so many of these rows are done


def aligned(place: int, align: int) -> int:
  """The first multiple of `align` that is not below `place`."""
  return -(-place // align) * align


def fill(read: Read, cursor: Cursor, length: int, config: PackingConfig) -> tuple[list[list[Piece]], Cursor]:
  """The next rows that are filled together, and the cursor behind them.

  Args:
    read: the documents.
    cursor: whose `rows` is not looked at.
    length: places in a row.
    config: concat fills one row: each document follows the one before it, and goes on in the next row where it was cut.
      best_fit takes documents for `window` rows, or a few more; one longer than a row is cut into whole rows and a
      rest, the others stay whole. Longest first, each goes where it leaves the least room.
  """
  if config.method == "concat":
    return _concat(read, cursor, length, config.align)
  return _best_fit(read, cursor, length, config.align, config.window)


def _concat(read: Read, cursor: Cursor, length: int, align: int) -> tuple[list[list[Piece]], Cursor]:
  number, start, _ = cursor
  row: list[Piece] = []
  place = 0
  while place < length:
    if (ids := read(number)) is None:
      break
    stop = min(len(ids) - 1, start + length - place)
    if stop > start:
      row.append(Piece(ids, start, stop))
      place = aligned(place + stop - start, align)
    number, start = (number + 1, 0) if stop >= len(ids) - 1 else (number, stop)
  return [row], Cursor(number, start, 0)


def _best_fit(read: Read, cursor: Cursor, length: int, align: int, window: int) -> tuple[list[list[Piece]], Cursor]:
  number, start, _ = cursor
  pieces: list[Piece] = []
  room = window * length
  while (ids := read(number)) is not None:
    stop = min(len(ids) - 1, start + length)
    if stop > start:
      room -= aligned(stop - start, align)
      if room < 0 and pieces:  # this one would have a row nearly to itself: it opens the next window
        break
      pieces.append(Piece(ids, start, stop))
    number, start = (number + 1, 0) if stop >= len(ids) - 1 else (number, stop)
  rows = [[pieces[i] for i in row] for row in best_fit([piece.stop - piece.start for piece in pieces], length, align)]
  return rows, Cursor(number, start, 0)


def best_fit(sizes: Sequence[int], length: int, align: int) -> list[list[int]]:
  """Numbers of the pieces in each row, ascending in every row; rows by their first piece.

  Args:
    sizes: of the pieces, 1 .. length each.
    length: of a row, a multiple of `align`.
    align: a piece starts at a multiple of it.
  """
  rows: list[list[int]] = []
  rooms: list[tuple[int, int]] = []  # (room, row), ascending
  for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
    size = aligned(sizes[i], align)
    best = bisect.bisect_left(rooms, (size, -1))
    if best == len(rooms):
      room, row = length, len(rows)
      rows.append([])
    else:
      room, row = rooms.pop(best)
    rows[row].append(i)
    bisect.insort(rooms, (room - size, row))
  return sorted(sorted(row) for row in rows)


def rows(documents: Sequence[np.ndarray], length: int, align: int) -> list[Row]:
  """All of these documents, one after the other, in as many rows as it takes; see `build`."""
  read = dict(enumerate(documents)).get
  cursor, found = Cursor(0, 0, 0), []
  while cursor.document < len(documents):
    (pieces,), cursor = _concat(read, cursor, length, align)
    found.append(build(pieces, length, align))
  return found


def build(pieces: Sequence[Piece], length: int, align: int) -> Row:
  """The row of these pieces: tokens, targets, segment_ids int32 [length], weights float32 [length]."""
  row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segment_ids")}
  place = 0
  for number, (ids, start, stop) in enumerate(pieces, 1):
    place = aligned(place, align)
    here = slice(place, place + stop - start)
    row["tokens"][here] = ids[start:stop]
    row["targets"][here] = ids[start + 1 : stop + 1]
    row["segment_ids"][here] = number
    place = here.stop
  row["weights"] = (row["segment_ids"] > 0).astype(np.float32)
  return row


def padding(segment_ids: np.ndarray) -> float:
  """Share of the places that no document fills."""
  return 1.0 - np.count_nonzero(segment_ids) / segment_ids.size
