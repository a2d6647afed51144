"""Steps whose loss or gradient is not finite, or whose gradient is far larger than usual: told, and ended if they last.

The step itself skips such an update, and changes its state no more once train.max_skipped were skipped in a row (see
step.py): the state that is dumped here is the one that the last of them met.
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

_SPIKE = 10.0  # times the median of the gradient norms before it
_REMEMBERED = 100  # of them
_ENOUGH = 20  # for a median worth comparing with


class Faulty:
  """Looks at the records of steps.

  Args:
    config: of the run.
    workdir: of the run.
    records: of its steps so far, whose gradient norms new ones are compared with.
  """

  def __init__(self, config: Config, workdir: epath.Path, records: Iterable[Record] = ()):
    self._config, self._workdir = config, workdir
    norms = (record["grad_norm"] for record in records if "skipped" not in record)
    self._norms = collections.deque(norms, maxlen=_REMEMBERED)
    self._batches: dict[int, tuple[Batch, range]] = {}

  def keep(self, step: int, batch: Batch, rows: range) -> None:
    """Keeps a step's batch until its record was seen; `rows` are their numbers in the run."""
    self._batches[step] = batch, rows

  def look(self, records: list[Record], current: TrainState) -> None:
    """Tells what is wrong with the steps since the last look, and marks spikes in their records.

    Args:
      records: of the steps, see metrics.Meter.collect.
      current: after them.

    Raises:
      Diverged: train.max_skipped updates in a row were skipped; what is needed to repeat the last is dumped.
    """
    most = self._config.train.max_skipped
    for record in records:
      if "skipped" not in record:
        self._compare(record)
        continue
      step, skipped = record["step"], int(record["skipped"])
      batch, rows = self._batches[step]
      told = f"step {step}: the loss or its gradient is not finite, on rows {rows[0]:,} to {rows[-1]:,} of the run"
      if skipped >= most:
        dumped = replay.dump(self._workdir, step, current, batch, self._config)
        raise Diverged(
          f"{told}. That makes {skipped} updates in a row that were skipped (train.max_skipped={most}). {dumped}. "
          "Checkpoints before are kept; a lower optimizer.learning_rate or optimizer.clip_norm may get past it"
        )
      tqdm.tqdm.write(f"{told}; its update is skipped (after {most} in a row the run ends, this is number {skipped})")
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
