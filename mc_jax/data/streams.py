"""Endless streams of rows, each with a cursor that a few integers tell.

A stream is one virtual shard of one source. What it yields after `seek(cursor)` is a function of the cursor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from mc_jax.data import packing, sources
from mc_jax.data.config import DataConfig, PartConfig
from mc_jax.data.documents import Documents, Order, chance, hashed
from mc_jax.data.packing import Cursor, Row
from mc_jax.errors import ConfigError


class Stream(Protocol):
  """Rows without end.

  Attributes:
    cursor: of the next row.
  """

  cursor: Cursor

  def __next__(self) -> Row:
    """Arrays [length] of a row: tokens, targets, segment_ids int32, weights float32."""

  def skip(self) -> None:
    """Passes a row."""

  def seek(self, cursor: Cursor) -> None:
    """Goes where another stream of the same arguments was."""


class Counted:
  """Rows that are a function of their number in the stream.

  Args:
    row: (number) -> row.
  """

  def __init__(self, row: Callable[[int], Row]):
    self._row = row
    self.cursor = Cursor(0, 0, 0)

  def __next__(self) -> Row:
    row = self._row(self.cursor.rows)
    self.skip()
    return row

  def skip(self) -> None:
    self.cursor = self.cursor._replace(rows=self.cursor.rows + 1)

  def seek(self, cursor: Cursor) -> None:
    self.cursor = cursor


class Packed:
  """Rows of packed documents.

  Args:
    read: (number) -> ids of the stream's document, for every number from 0: see packing.fill.
    config: its length and packing.
    first: rows that best_fit fills together at the start, instead of packing.window; differs from stream to stream,
      lest all be filled anew at the same step.
  """

  def __init__(self, read: packing.Read, config: DataConfig, first: int | None = None):
    self._read = read
    self._length, self._packing = config.length, config.packing
    self._first = dataclasses.replace(config.packing, window=first or config.packing.window)
    self.seek(Cursor(0, 0, 0))

  @property
  def cursor(self) -> Cursor:
    if self._filled and self._done == len(self._filled):
      return self._behind
    return self._start._replace(rows=self._done)

  def __next__(self) -> Row:
    self._fill()
    row = packing.build(self._filled[self._done], self._length, self._packing.align)
    self._done += 1
    return row

  def skip(self) -> None:
    self._fill()
    self._done += 1

  def seek(self, cursor: Cursor) -> None:
    self._start, self._done, self._filled = cursor._replace(rows=0), cursor.rows, None

  def _fill(self) -> None:
    """Has rows that are not done: those of the cursor, or, when they are, the next.

    A cursor can have more rows done than there are, where documents have come to the corpus since.
    """
    while self._filled is None or self._done >= len(self._filled):
      if self._filled is not None:
        self._start, self._done = self._behind, 0
      how = self._first if self._start[:2] == (0, 0) else self._packing
      self._filled, self._behind = packing.fill(self._read, self._start, self._length, how)


def packed(
  documents: Documents, order: Order, part: PartConfig, config: DataConfig, key: tuple[int | str, ...], shard: int
) -> Packed:
  """The stream of shard `shard`: every config.virtual_shards-th document of `order`.

  Args:
    key: of what is random besides the order; differs from source to source.
  """
  shards = config.virtual_shards
  empty = np.zeros(0, np.int32)

  def wanted(number: int) -> np.ndarray:
    i = order[number]
    if part.split == "both" and sources.held_out(documents.name(i), config.validation_fraction, config.seed):
      return empty
    ids = documents[i]
    short = len(ids) - 2 < part.long_tokens
    return empty if short and part.long_weight > 1 and chance(*key, number) * part.long_weight >= 1 else ids

  missed = 0

  def read(number: int) -> np.ndarray:
    nonlocal missed
    ids = wanted(shard + shards * number)
    missed = 0 if len(ids) else missed + 1
    if missed > 10_000 + 100 * len(documents):
      raise ConfigError(
        f"no document to train on among {len(documents)} of {part.source} ({part.paths}): they are empty, malformed, "
        "or all held out for validation (data.validation_fraction)"
      )
    return ids

  return Packed(read, config, 1 + shard % config.packing.window)


class Mixture:
  """One virtual shard of a run: each row is one of its sources'.

  Which source a row is of is drawn by weight, a function of the seed, the shard and the row's number.

  Args:
    streams: by the name of their source, with the weight of each.
    key: of the draws.

  Attributes:
    drawn: rows drawn so far.
  """

  def __init__(self, streams: dict[str, tuple[Stream, float]], key: tuple[int | str, ...]):
    self._streams = [stream for stream, _ in streams.values()]
    weights = np.array([weight for _, weight in streams.values()])
    self._ends = np.cumsum(weights / weights.sum())
    self._ends[np.flatnonzero(weights)[-1] :] = 1.0  # whatever the rounding
    self._key = key
    self.drawn = 0

  def row(self, number: int) -> Row:
    """Row `number`, which must not be before `drawn`; those between are passed."""
    while self.drawn < number:
      self._next().skip()
      self.drawn += 1
    row = next(self._next())
    self.drawn += 1
    return row

  def _next(self) -> Stream:
    if len(self._streams) == 1:
      return self._streams[0]
    return self._streams[int(np.searchsorted(self._ends, chance(*self._key, self.drawn), side="right"))]

  @property
  def state(self) -> np.ndarray:
    """[1 + 3 sources] int64: `drawn`, and the cursor of each stream."""
    return np.array([self.drawn, *(n for stream in self._streams for n in stream.cursor)], np.int64)

  def restore(self, state: np.ndarray) -> None:
    """Goes where another mixture of the same arguments was."""
    self.drawn = int(state[0])
    for stream, cursor in zip(self._streams, np.reshape(state[1:], (-1, 3)), strict=True):
      stream.seek(Cursor(*(int(n) for n in cursor)))


def windows(rows: Sequence[Row], shards: int, shard: int) -> Mixture:
  """The rows of a shard, of rows that any number gives; such as those of windows.training."""
  return Mixture({"windows": (Counted(lambda number: rows[number * shards + shard]), 1.0)}, ())


def generator(*key: int | str) -> np.random.Generator:
  """Random numbers that are a function of the key."""
  return np.random.default_rng(hashed(key))
