"""Shows the progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time

import tqdm

from mc_jax.training import distributed


class Progress:
  """Finished steps out of all, the latest figures and an estimate of the remaining time.

  Args:
    step: Steps already done.
    steps: All steps, including those done.
    unit: The unit of losses, such as "byte".
    units_per_token: Units per token of the training data.
  """

  def __init__(self, step: int, steps: int, unit: str = "byte", units_per_token: float = 1.0):
    self._unit = unit
    self._units_per_token = units_per_token
    self._first = step
    self._steps = steps
    self._start = time.monotonic()
    self._validation = ""
    self._bar = None
    if sys.stderr.isatty() and distributed.is_first():
      self._bar = tqdm.tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

  def report(self, record: dict[str, float]) -> None:
    """Shows the record of a step, see metrics.Meter.collect."""
    step, loss = record["step"], record.get("loss", math.nan)  # nan if the update was skipped
    bits = loss / math.log(2) / self._units_per_token
    figures = f"{bits:.3f} bits per {self._unit}, {record['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in record:
      figures += f", MFU {record['mfu']:.1%}"
    validation = record.get(f"validation_bits_per_{self._unit}")
    if validation is not None:
      self._validation = f", validation {validation:.3f}"
    if self._bar is not None:
      self._bar.set_postfix_str(figures + self._validation, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    if validation is not None:
      figures += self._validation
    elapsed = time.monotonic() - self._start
    left = elapsed / (step - self._first) * (self._steps - step)
    print(f"step {step}/{self._steps}: {figures}, {duration(left)} left", flush=True)

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *_) -> None:
    if self._bar is not None:
      self._bar.close()


def duration(seconds: float) -> str:
  """12.3 s as "0:12", 3723 s as "1:02:03"."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
