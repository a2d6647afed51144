"""Batches of a job's rows, which do not depend on the number of processes and workers.

Row i of a run is the next row of virtual shard i modulo the number of shards; batch t consists of rows t B to
t B + B - 1. A shard yields the same rows whichever process draws them, so a row is a function of the seed and its
number, and a run's position is that of its shards. Each process draws, and tracks the shards of, its devices' rows
only; a checkpoint gathers the positions of all shards.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence

import grain
import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from mc_jax.data import workers as workers_lib
from mc_jax.data.identity import Identity
from mc_jax.data.packing import Row
from mc_jax.data.streams import Mixture

IDENTITY = "identity"  # key in the state of Batches
_AHEAD = 2  # steps that a worker prepares in advance


class Rows:
  """An iterator over batches that yields the rows of one process, {row of the batch: arrays}.

  Args:
    make: A function from a shard's number to its rows, starting with the first.
    shards: The number of shards.
    batch: The number of rows in a batch, over all processes.
    rows: The rows of the batch that this process needs.
    workers: The number of worker processes, each with its own part of the shards; 0: this process prepares the rows.

  Attributes:
    position: The number of rows drawn so far by all processes, a multiple of `batch`.
    states: {shard: Mixture.state} of the shards drawn from, as of `position`, however far ahead the workers are.
    padding: The share of positions that no document has filled since the start.
  """

  def __init__(self, make: Callable[[int], Mixture], shards: int, batch: int, rows: Sequence[int], workers: int = 0):
    self._make, self._shards, self._batch, self._rows, self._workers = make, shards, batch, tuple(rows), workers
    self._steps: Iterator | None = None
    self._places = self._filled = 0
    self.position = 0
    self.states: dict[int, np.ndarray] = {}

  def seek(self, position: int, states: dict[int, np.ndarray]) -> None:
    """Moves to a position. Shards without a state start at their first row and skip to the position."""
    self.close()
    self.position, self.states = position, dict(states)

  def __iter__(self) -> Rows:
    return self

  def __next__(self) -> dict[int, Row]:
    if self._steps is None:
      self._start()
    rows: dict[int, Row] = {}
    for _ in range(max(1, self._workers)):
      drawn, states = next(self._steps)
      rows |= drawn
      self.states |= states
    for row in rows.values():
      ids = row.get("segment_ids", row["tokens"][:0])
      self._places += ids.size
      self._filled += np.count_nonzero(ids)
    self.position += self._batch
    return rows

  @property
  def padding(self) -> float:
    return 1.0 - self._filled / self._places if self._places else 0.0

  def close(self) -> None:
    """Stops the workers; the next row starts new ones."""
    if self._steps is not None and self._workers:
      self._steps.close()
    self._steps = None

  def _start(self) -> None:
    steps = _Steps(self._make, self._shards, self._batch, self._rows, self.position, self.states)
    if self._workers:
      if not flags.FLAGS.is_parsed():  # Grain's workers read flags even if there is no command line
        flags.FLAGS.mark_as_parsed()
      options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=_AHEAD)
      # Send rows through pipes: Grain's shared memory outlives a process that ends before it has read everything.
      through_pipe = grain.experimental.DatasetOptions(min_shm_size=1 << 62)
      steps = grain.experimental.WithOptionsIterDataset(steps, through_pipe).mp_prefetch(options, _own_signals)
    self._steps = iter(steps)


def _own_signals(worker: int, workers: int) -> None:
  """Lets a worker ignore signals, because the trainer may draw rows after one, and end with the trainer."""
  del worker, workers
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  workers_lib.follow_parent()


class _Steps(grain.IterDataset):
  """(rows of a step, {shard: its state after them}) for all shards, or those of worker w of W: w, w + W, ..."""

  def __init__(self, make, shards: int, batch: int, rows: tuple[int, ...], position: int, states: dict):
    super().__init__()
    self._arguments = (make, shards, batch, rows, position, states)
    self._slice = slice(0, None, 1)

  def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
    """Selects a worker's shards; Grain calls this on a source that workers share."""
    del sequential_slice
    self._slice = sl

  def __iter__(self) -> grain.DatasetIterator:
    return _StepsIterator(*self._arguments, self._slice)


class _StepsIterator(grain.DatasetIterator):
  """Iterator of _Steps. Its elements carry its position, so Grain's state is empty."""

  def __init__(self, make, shards, batch, rows, position, states, shard_slice):
    super().__init__()
    self._make, self._shards, self._batch, self._rows, self._position = make, shards, batch, rows, position
    self._states, self._slice = states, shard_slice
    self._mixtures: dict[int, Mixture] = {}

  def __next__(self) -> tuple[dict[int, Row], dict[int, np.ndarray]]:
    drawn, touched = {}, set()
    for row in self._rows:
      number, shard = divmod(self._position + row, self._shards)
      if shard % self._slice.step == self._slice.start:
        drawn[row] = self._mixture(shard).row(number)
        touched.add(shard)
    self._position += self._batch
    return drawn, {shard: self._mixtures[shard].state for shard in touched}

  def _mixture(self, shard: int) -> Mixture:
    if shard not in self._mixtures:
      self._mixtures[shard] = self._make(shard)
      if shard in self._states:
        self._mixtures[shard].restore(self._states[shard])
    return self._mixtures[shard]

  def get_state(self) -> dict:
    return {}

  def set_state(self, state: dict) -> None:
    raise NotImplementedError("Rows keeps the position")


class Batches:
  """An iterator over batches, {name: array of the whole job}.

  Args:
    make: See Rows.
    shards: The number of virtual shards.
    shapes: The shapes, dtypes and shardings of a batch, see windows.shapes.
    workers: See Rows.
    states: Whether the state of a run includes the shards' states; False if every row is a function of its number.
    identity: The identity of the data, stored with the position.
  """

  def __init__(
    self,
    make: Callable[[int], Mixture],
    shards: int,
    shapes: dict[str, jax.ShapeDtypeStruct],
    workers: int = 0,
    states: bool = False,
    identity: Identity | None = None,
  ):
    self._shapes, self._shards, self._states = shapes, shards, states
    self._identity = {} if identity is None else {IDENTITY: dataclasses.asdict(identity)}
    spec = shapes["tokens"]
    indices = spec.sharding.addressable_devices_indices_map(spec.shape).values()
    rows = sorted({row for index in indices for row in range(spec.shape[0])[index[0]]})
    self._rows = Rows(make, shards, spec.shape[0], rows, workers)

  def __iter__(self) -> Batches:
    return self

  def __next__(self) -> dict[str, jax.Array]:
    rows = next(self._rows)

    def block(name: str, index: tuple[slice, slice]) -> np.ndarray:
      numbers, columns = index
      return np.stack([rows[i][name][columns] for i in range(self._shapes[name].shape[0])[numbers]])

    return {
      name: jax.make_array_from_callback(spec.shape, spec.sharding, functools.partial(block, name))
      for name, spec in self._shapes.items()
    }

  @property
  def position(self) -> int:
    """The number of rows drawn so far by all processes."""
    return self._rows.position

  @property
  def padding(self) -> float:
    """The share of positions in this process's rows that no document has filled since the start."""
    return self._rows.padding

  def state(self) -> dict:
    """The position, JSON-serialisable and independent of the number of processes. All processes must call this."""
    state = {"rows": self.position, **self._identity}
    if not self._states:
      return state
    states = merge(_gather(table(self._rows.states, self._shards)))
    return state | {"shards": {str(shard): row.tolist() for shard, row in states.items()}}

  def restore(self, state: dict) -> None:
    """Moves to the position of `state`, which must come from a run with the same DataConfig.order."""
    shards = state.get("shards", {}) if self._states else {}
    self._rows.seek(state["rows"], {int(shard): np.array(row, np.int64) for shard, row in shards.items()})

  def close(self) -> None:
    """Stops the workers."""
    self._rows.close()


def table(states: dict[int, np.ndarray], shards: int) -> np.ndarray:
  """One process's states as an int64 array [shards, width], -1 where it has none."""
  width = len(next(iter(states.values()))) if states else 0
  rows = np.full((shards, width), -1, np.int64)
  for shard, state in states.items():
    rows[shard] = state
  return rows


def merge(tables: Iterable[np.ndarray]) -> dict[int, np.ndarray]:
  """{shard: state} from the tables of several processes; for each shard the state with the most rows drawn."""
  latest: dict[int, np.ndarray] = {}
  for rows in tables:
    for shard in np.flatnonzero(rows[:, 0] >= 0) if rows.size else ():
      if shard not in latest or rows[shard, 0] > latest[shard][0]:
        latest[int(shard)] = rows[shard]
  return dict(sorted(latest.items()))


def _gather(rows: np.ndarray) -> list[np.ndarray]:
  """The tables of all processes."""
  if jax.process_count() == 1:
    return [rows]
  halves = multihost_utils.process_allgather(rows.view(np.int32))  # JAX has no int64 by default
  return list(np.asarray(halves).view(np.int64))
