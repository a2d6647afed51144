"""Endless streams of rows, whose positions are cursors of a few integers.

A stream is one virtual shard of one source. The rows that it yields after `seek(cursor)` are a function of the cursor.
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
  """An endless iterator of rows.

  Attributes:
    cursor: The position of the next row.
  """

  cursor: Cursor

  def __next__(self) -> Row:
    """The next row, arrays [length]: tokens, targets and segment_ids int32, weights float32."""

  def skip(self) -> None:
    """Skips a row."""

  def seek(self, cursor: Cursor) -> None:
    """Moves to the cursor of a stream with the same arguments."""


class Counted:
  """A stream whose rows are a function of their number.

  Args:
    row: The function from a number, from 0, to a row.
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
  """A stream of rows of packed documents.

  Args:
    read: A function from the number of a document in the stream, from 0, to its ids; see packing.fill.
    config: The configuration, of which length and packing are used.
    first: The number of rows in best_fit's first group, instead of packing.window. If it differs between streams, they
      do not all fill new rows at the same step.
  """

  def __init__(self, read: packing.Read, config: DataConfig, first: int | None = None):
    self._read = read
    self._length, self._packing = config.length, config.packing
    self._first = dataclasses.replace(config.packing, window=first or config.packing.window)
    self.seek(Cursor(0, 0, 0))

  @property
  def cursor(self) -> Cursor:
    if self._filled and self._done == len(self._filled):
      return self._next_start
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
    """Fills the group of rows at the cursor, and those after it until one has rows that are not done.

    A cursor can have more rows done than its group holds, if documents were added to the corpus since.
    """
    while self._filled is None or self._done >= len(self._filled):
      if self._filled is not None:
        self._start, self._done = self._next_start, 0
      config = self._first if self._start[:2] == (0, 0) else self._packing
      self._filled, self._next_start = packing.fill(self._read, self._start, self._length, config)


def packed(
  documents: Documents, order: Order, part: PartConfig, config: DataConfig, key: tuple[int | str, ...], shard: int
) -> Packed:
  """The stream of virtual shard `shard`, with every config.virtual_shards-th document of `order`.

  Args:
    documents: The source's documents.
    order: Their order.
    part: The source's configuration.
    config: The run's configuration.
    key: The key of random choices other than the order; differs from source to source.
    shard: The shard's number, from 0.

  Raises:
    ConfigError: While it is read: no document is left to train on.
  """
  shards = config.virtual_shards
  empty = np.zeros(0, np.int32)

  def selected(number: int) -> np.ndarray:
    i = order[number]
    if part.split == "both" and sources.held_out(documents.name(i), config.validation_fraction, config.seed):
      return empty
    ids = documents[i]
    short = len(ids) - 2 < part.long_tokens
    return empty if short and part.long_weight > 1 and chance(*key, number) * part.long_weight >= 1 else ids

  missed = 0

  def read(number: int) -> np.ndarray:
    nonlocal missed
    ids = selected(shard + shards * number)
    missed = 0 if len(ids) else missed + 1
    if missed > 10_000 + 100 * len(documents):
      raise ConfigError(
        f"no document to train on among {len(documents)} of {part.source} ({part.paths}): all are empty, malformed, "
        "or held out for validation (data.validation_fraction)"
      )
    return ids

  return Packed(read, config, 1 + shard % config.packing.window)


class Mixture:
  """One virtual shard of a run, whose rows come from several sources.

  The source of each row is drawn by weight, as a function of the key and the row's number.

  Args:
    streams: {source: (stream, weight)}.
    key: The key of the draws.

  Attributes:
    drawn: The number of rows drawn so far.
  """

  def __init__(self, streams: dict[str, tuple[Stream, float]], key: tuple[int | str, ...]):
    self._streams = [stream for stream, _ in streams.values()]
    weights = np.array([weight for _, weight in streams.values()])
    self._ends = np.cumsum(weights / weights.sum())
    self._ends[np.flatnonzero(weights)[-1] :] = 1.0  # despite rounding
    self._key = key
    self.drawn = 0

  def row(self, number: int) -> Row:
    """Row `number`, which is at least `drawn`; rows in between are skipped."""
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
    """`drawn` and the cursor of each stream: int64 [1 + 3 * sources]."""
    return np.array([self.drawn, *(n for stream in self._streams for n in stream.cursor)], np.int64)

  def restore(self, state: np.ndarray) -> None:
    """Moves to the state of a mixture with the same arguments."""
    self.drawn = int(state[0])
    for stream, cursor in zip(self._streams, np.reshape(state[1:], (-1, 3)), strict=True):
      stream.seek(Cursor(*(int(n) for n in cursor)))


def windows(rows: Sequence[Row], shards: int, shard: int) -> Mixture:
  """The stream of a shard of rows that can be read by number, such as those of windows.training."""
  return Mixture({"windows": (Counted(lambda number: rows[number * shards + shard]), 1.0)}, ())


def generator(*key: int | str) -> np.random.Generator:
  """A random generator that is a function of the key."""
  return np.random.default_rng(hashed(key))
