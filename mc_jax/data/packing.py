"""Documents packed into rows.

A document of ids d_0 .. d_n, with separators at both ends, fills n positions: position i has the token d_i and the
target d_(i+1). A piece is a stretch of these positions. A row consists of pieces of one or more documents, with the
segment ids 1, 2, ... from left to right; 0 marks padding, in gaps left by alignment and at the end of the row. Nothing
carries over between pieces, and models derive positions that count from each piece's start from segment_ids.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mc_jax.data.config import PackingConfig

Row = dict[str, np.ndarray]
# From a document's number, from 0, to its ids, int32 [n + 1], or [0] to leave it out; None after the last document.
Read = Callable[[int], np.ndarray | None]


class Piece(NamedTuple):
  """Positions `start` to `stop` - 1 of a document."""

  ids: np.ndarray  # ids of the whole document, int32 [n + 1]
  start: int
  stop: int


class Cursor(NamedTuple):
  """The position of a stream of rows, which determines all that follow. Rows are filled in groups."""

  document: int  # number of the document that the current group of rows starts with
  place: int  # position in that document
  rows: int  # number of rows of the group that are done


def aligned(place: int, align: int) -> int:
  """The smallest multiple of `align` that is at least `place`."""
  return -(-place // align) * align


def fill(read: Read, cursor: Cursor, length: int, config: PackingConfig) -> tuple[list[list[Piece]], Cursor]:
  """The next group of rows, and the cursor after it.

  concat fills one row: documents follow each other, and one that is cut at the end continues in the next row. best_fit
  fills about `window` rows together: documents longer than a row are cut into whole rows and a rest, others stay whole;
  longest first, each piece goes to the row where it leaves the least room.

  Args:
    read: The documents.
    cursor: The start of the group; its `rows` is ignored.
    length: The number of positions in a row.
    config: The method and its settings.

  Returns:
    The pieces of each row, and the next cursor.
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
      if room < 0 and pieces:  # it would have a row nearly to itself, so it opens the next window
        break
      pieces.append(Piece(ids, start, stop))
    number, start = (number + 1, 0) if stop >= len(ids) - 1 else (number, stop)
  rows = [[pieces[i] for i in row] for row in best_fit([piece.stop - piece.start for piece in pieces], length, align)]
  return rows, Cursor(number, start, 0)


def best_fit(sizes: Sequence[int], length: int, align: int) -> list[list[int]]:
  """The numbers of the pieces in each row, ascending; rows are sorted by their first piece.

  Args:
    sizes: The pieces' sizes, from 1 to `length`.
    length: The length of a row, a multiple of `align`.
    align: Pieces start at multiples of it.
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
  """Rows, as `build` returns, of all documents in order."""
  read = dict(enumerate(documents)).get
  cursor, built = Cursor(0, 0, 0), []
  while cursor.document < len(documents):
    (pieces,), cursor = _concat(read, cursor, length, align)
    built.append(build(pieces, length, align))
  return built


def build(pieces: Sequence[Piece], length: int, align: int) -> Row:
  """The row with these pieces: tokens, targets and segment_ids int32 [length], weights float32 [length]."""
  row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segment_ids")}
  place = 0
  for number, (ids, start, stop) in enumerate(pieces, 1):
    place = aligned(place, align)
    span = slice(place, place + stop - start)
    row["tokens"][span] = ids[start:stop]
    row["targets"][span] = ids[start + 1 : stop + 1]
    row["segment_ids"][span] = number
    place = span.stop
  row["weights"] = (row["segment_ids"] > 0).astype(np.float32)
  return row


def padding(segment_ids: np.ndarray) -> float:
  """The share of positions that no document fills."""
  return 1.0 - np.count_nonzero(segment_ids) / segment_ids.size
