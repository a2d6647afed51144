"""Batches for a job: the rows of this process's devices, the same whatever the processes and workers.

Row i of a run is the next one of virtual shard i modulo their number; batch t is rows t B .. t B + B - 1. A shard goes
its way whoever draws from it, so that a row is a function of the seed and its number, and the position of a run is that
of its shards. A process follows the shards of its own rows; together they know all positions, which a checkpoint holds.
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

IDENTITY = "identity"  # in the state of Batches
_AHEAD = 2  # steps that a worker prepares before they are asked for


class Rows:
  """The rows of each batch that a process needs, {row of the batch: arrays}.

  Args:
    make: (shard) -> its rows from the first on.
    shards: number of them.
    batch: rows of a batch, in all processes.
    rows: those of this process.
    workers: processes that prepare them; each has its own part of the shards.

  Attributes:
    position: rows of all processes drawn so far; a multiple of `batch`.
    states: of the shards that rows were drawn from, see Mixture.state: as they are at `position`, however far ahead
      the workers are.
    padding: share of the places that no document filled, since the start.
  """

  def __init__(self, make: Callable[[int], Mixture], shards: int, batch: int, rows: Sequence[int], workers: int = 0):
    self._make, self._shards, self._batch, self._rows, self._workers = make, shards, batch, tuple(rows), workers
    self._steps: Iterator | None = None
    self._places = self._filled = 0
    self.position = 0
    self.states: dict[int, np.ndarray] = {}

  def seek(self, position: int, states: dict[int, np.ndarray]) -> None:
    """Goes to a position; shards whose state is not given start at their first row, and pass those before it."""
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
    """Ends the workers; the next row starts new ones."""
    if self._steps is not None and self._workers:
      self._steps.close()
    self._steps = None

  def _start(self) -> None:
    steps = _Steps(self._make, self._shards, self._batch, self._rows, self.position, self.states)
    if self._workers:
      if not flags.FLAGS.is_parsed():  # Grain's workers ask for flags of their own, also where there is no command line
        flags.FLAGS.mark_as_parsed()
      options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=_AHEAD)
      # Rows come through a pipe: Grain's shared memory outlives a process that ends with some still to be read.
      through_pipe = grain.experimental.DatasetOptions(min_shm_size=1 << 62)
      steps = grain.experimental.WithOptionsIterDataset(steps, through_pipe).mp_prefetch(options, _own_signals)
    self._steps = iter(steps)


def _own_signals(worker: int, workers: int) -> None:
  """In a worker: stopping is the trainer's to decide, who may draw rows after a signal; and a worker ends with it."""
  del worker, workers
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  workers_lib.follow_parent()


class _Steps(grain.IterDataset):
  """(rows of a step, {shard: its state behind them}), of all shards or a worker's: worker w of W has w, w + W, ..."""

  def __init__(self, make, shards: int, batch: int, rows: tuple[int, ...], position: int, states: dict):
    super().__init__()
    self._arguments = (make, shards, batch, rows, position, states)
    self._slice = slice(0, None, 1)

  def set_slice(self, part: slice, sequential_slice: bool = False) -> None:
    """What Grain asks of a source that workers share."""
    del sequential_slice
    self._slice = part

  def __iter__(self) -> grain.DatasetIterator:
    return _StepsIterator(*self._arguments, self._slice)


class _StepsIterator(grain.DatasetIterator):
  """Iterator of _Steps. Its position is told by its elements, not by Grain's state."""

  def __init__(self, make, shards, batch, rows, position, states, part):
    super().__init__()
    self._make, self._shards, self._batch, self._rows, self._position = make, shards, batch, rows, position
    self._states, self._part = states, part
    self._mixtures: dict[int, Mixture] = {}

  def __next__(self) -> tuple[dict[int, Row], dict[int, np.ndarray]]:
    drawn, touched = {}, set()
    for row in self._rows:
      number, shard = divmod(self._position + row, self._shards)
      if shard % self._part.step == self._part.start:
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
    raise NotImplementedError("positions are those of Rows")


class Batches:
  """Batches as arrays of the whole job.

  Args:
    make: see Rows.
    shards: number of virtual shards.
    shapes: of a batch, with shardings; see windows.shapes.
    workers: see Rows.
    states: Whether a position is kept with the shards' states; without them rows are functions of their number.
    identity: What the rows are read from, which is kept with the position.
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

    def part(name: str, index: tuple[slice, slice]) -> np.ndarray:
      numbers, columns = index
      return np.stack([rows[i][name][columns] for i in range(self._shapes[name].shape[0])[numbers]])

    return {
      name: jax.make_array_from_callback(spec.shape, spec.sharding, functools.partial(part, name))
      for name, spec in self._shapes.items()
    }

  @property
  def position(self) -> int:
    """Rows drawn so far, in all processes."""
    return self._rows.position

  @property
  def padding(self) -> float:
    """Share of the places of this process's rows that no document filled, since the start."""
    return self._rows.padding

  def state(self) -> dict:
    """The position, as JSON's types; of one process's batches or of another number's, it is the same. A collective."""
    place = {"rows": self.position, **self._identity}
    if not self._states:
      return place
    states = merge(_gather(table(self._rows.states, self._shards)))
    return place | {"shards": {str(shard): row.tolist() for shard, row in states.items()}}

  def restore(self, state: dict) -> None:
    """Goes where `state` was taken, in rows of the same DataConfig.order."""
    shards = state.get("shards", {}) if self._states else {}
    self._rows.seek(state["rows"], {int(shard): np.array(row, np.int64) for shard, row in shards.items()})

  def close(self) -> None:
    """Ends the workers."""
    self._rows.close()


def table(states: dict[int, np.ndarray], shards: int) -> np.ndarray:
  """[shards, width] int64 of what one process knows; -1 where it knows nothing."""
  width = len(next(iter(states.values()))) if states else 0
  rows = np.full((shards, width), -1, np.int64)
  for shard, state in states.items():
    rows[shard] = state
  return rows


def merge(tables: Iterable[np.ndarray]) -> dict[int, np.ndarray]:
  """{shard: state} of what several processes know. Each shard's is that of the one that has drawn most."""
  known: dict[int, np.ndarray] = {}
  for rows in tables:
    for shard in np.flatnonzero(rows[:, 0] >= 0) if rows.size else ():
      if shard not in known or rows[shard, 0] > known[shard][0]:
        known[int(shard)] = rows[shard]
  return dict(sorted(known.items()))


def _gather(rows: np.ndarray) -> list[np.ndarray]:
  """The tables of all processes."""
  if jax.process_count() == 1:
    return [rows]
  halves = multihost_utils.process_allgather(rows.view(np.int32))  # JAX has no int64 by default
  return list(np.asarray(halves).view(np.int64))
