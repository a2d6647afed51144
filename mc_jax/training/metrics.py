"""The records of a run: metrics.jsonl and TensorBoard events, one record per step."""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import tensorboardX

from mc_jax import storage
from mc_jax.parallel import chips

JSONL = "metrics.jsonl"
TENSORBOARD = "tensorboard"

Record = dict[str, float]  # "step" and the values of that step


def device_memory(device: jax.Device) -> dict[str, float]:
  """{"device_memory_gib", "device_memory_peak_gib"} if the platform reports them, else {}."""
  stats = device.memory_stats() or {}
  names = {"device_memory_gib": "bytes_in_use", "device_memory_peak_gib": "peak_bytes_in_use"}
  return {name: stats[key] / 2**30 for name, key in names.items() if key in stats}


class Diverged(RuntimeError):
  """The loss, its gradient or a parameter is not finite; the message names the step."""


def require_finite(step: int, params: object) -> None:
  """Raises Diverged if any parameter is not finite: such a state must not become a checkpoint."""
  if not _all_finite(params):
    raise Diverged(
      f"step {step}: a parameter is not finite. No checkpoint of it was written, older ones are kept; "
      "a lower optimizer.learning_rate may get past it"
    )


@jax.jit
def _all_finite(tree: object) -> jax.Array:
  return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


class MetricsLog:
  """Appends records to a workdir; a run that resumes from step s first drops the records after s.

  A run that was killed has logged steps after its last checkpoint. They are run and logged again, so that the file
  never has a step twice.
  """

  def __init__(self, workdir: pathlib.Path, step: int):
    path = workdir / JSONL
    _truncate(path, step)
    self._file = path.open("a", encoding="utf-8")
    self._events = tensorboardX.SummaryWriter(str(workdir / TENSORBOARD), purge_step=step + 1)

  def write(self, records: list[Record]) -> None:
    """Appends records and flushes them to the operating system, so that they survive the process."""
    for record in records:
      self._file.write(json.dumps(record) + "\n")
      for name, value in record.items():
        if name != "step":
          self._events.add_scalar(name, value, record["step"])
    self._file.flush()
    self._events.flush()

  def __enter__(self) -> MetricsLog:
    return self

  def __exit__(self, *_) -> None:
    self._file.close()
    self._events.close()


class Meter:
  """Collects the steps' values without waiting for them, and measures the steps' speed.

  Args:
    tokens: Tokens in a step.
    devices: The devices that share the step.
  """

  def __init__(self, tokens: int, devices: Sequence[jax.Device]):
    self._tokens = tokens
    self._devices = devices
    self._pending: list[tuple[int, dict[str, jax.Array]]] = []
    self._flops = 0
    self.seconds = 0.0  # in steps alone
    self.steps = 0
    self.restart()

  def restart(self) -> None:
    """Starts timing steps: the time since the last `collect` was not training."""
    self._since = time.monotonic()

  def add(self, step: int, values: dict[str, jax.Array], flops: int = 0) -> None:
    """Adds a step's scalars, which may still be being computed, and its useful FLOPs if the devices' peak is known."""
    self._pending.append((step, values))
    self._flops += flops

  @property
  def tokens_per_second(self) -> float:
    """Speed over all collected steps."""
    return self.steps * self._tokens / self.seconds

  def collect(self) -> list[Record]:
    """Waits for the steps added since the last call, and returns a record for each; the last has the speed.

    Only records of skipped updates have "skipped". Values that are not finite are left out.
    """
    steps, values = zip(*self._pending, strict=True)
    values = jax.device_get(values)
    seconds = time.monotonic() - self._since
    self.seconds += seconds
    self.steps += len(steps)
    self._pending = []
    records = []
    for step, scalars in zip(steps, values, strict=True):
      record = {"step": step, **{name: float(value) for name, value in scalars.items()}}
      if not record["skipped"]:
        del record["skipped"]
      records.append({name: value for name, value in record.items() if math.isfinite(value)})
    step_time = seconds / len(steps)
    records[-1] |= {"step_time": step_time, "tokens_per_second": self._tokens / step_time}
    if self._flops:
      records[-1]["mfu"] = self._flops / seconds / (len(self._devices) * chips.peak_flops(self._devices[0]))
    self._flops = 0
    records[-1] |= device_memory(jax.local_devices()[0])
    return records


def read(workdir: pathlib.Path) -> list[Record]:
  """The records of a workdir, in order, without a last line that a kill cut short."""
  path = workdir / JSONL
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith("\n")]


def _truncate(path: pathlib.Path, step: int) -> None:
  kept = [record for record in read(path.parent) if record["step"] <= step]
  storage.write(path, "".join(json.dumps(record) + "\n" for record in kept))
