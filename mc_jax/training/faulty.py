"""Reports steps whose loss or gradient is not finite or unusually large, and ends a run that has too many in a row.

The step itself skips an update that is not finite, and stops updating once train.max_skipped were skipped in a row (see
step.py): the state dumped here is the one in which the last of them failed.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Iterable

import tqdm
from etils import epath

from mc_jax.training import replay
from mc_jax.training.config import Config
from mc_jax.training.metrics import Diverged, Record
from mc_jax.training.state import TrainState
from mc_jax.training.step import Batch

_SPIKE = 10.0  # a spike is a gradient norm this many times the median of those before it
_REMEMBERED = 100  # norms in the median, at most
_ENOUGH = 20  # norms in the median, at least


class Faulty:
  """Examines the records of steps.

  Args:
    config: The run's configuration.
    workdir: The run's workdir.
    records: The records of its steps so far, with whose gradient norms new ones are compared.
  """

  def __init__(self, config: Config, workdir: epath.Path, records: Iterable[Record] = ()):
    self._config, self._workdir = config, workdir
    norms = (record["grad_norm"] for record in records if "skipped" not in record)
    self._norms = collections.deque(norms, maxlen=_REMEMBERED)
    self._batches: dict[int, tuple[Batch, range]] = {}

  def keep(self, step: int, batch: Batch, rows: range) -> None:
    """Keeps a step's batch until its record is examined; `rows` are the rows' numbers in the run."""
    self._batches[step] = batch, rows

  def look(self, records: list[Record], current: TrainState) -> None:
    """Reports faulty steps since the last call, and marks spikes in their records.

    Args:
      records: The steps' records, see metrics.Meter.collect.
      current: The state after them.

    Raises:
      Diverged: train.max_skipped updates in a row were skipped; the last one's state and batch are dumped.
    """
    most = self._config.train.max_skipped
    for record in records:
      if "skipped" not in record:
        self._compare(record)
        continue
      step, skipped = record["step"], int(record["skipped"])
      batch, rows = self._batches[step]
      line = f"step {step}: the loss or its gradient is not finite, on rows {rows[0]:,} to {rows[-1]:,} of the run"
      if skipped >= most:
        dumped = replay.dump(self._workdir, step, current, batch, self._config)
        raise Diverged(
          f"{line}. That makes {skipped} updates in a row that were skipped (train.max_skipped={most}). {dumped}. "
          "Checkpoints before are kept; a lower optimizer.learning_rate or optimizer.clip_norm may get past it"
        )
      tqdm.tqdm.write(f"{line}; its update is skipped (after {most} in a row the run ends, this is number {skipped})")
    self._batches.clear()

  def _compare(self, record: Record) -> None:
    norm = record["grad_norm"]
    usual = statistics.median(self._norms) if len(self._norms) >= _ENOUGH else norm
    if norm > _SPIKE * usual:
      record["grad_norm_spike"] = norm / usual
      tqdm.tqdm.write(
        f"step {record['step']}: the gradient's norm is {norm:.3g}, {norm / usual:.0f} times the median of the last "
        f"{len(self._norms)} steps"
      )
    self._norms.append(norm)
