"""A jax.profiler trace of chosen steps."""

from __future__ import annotations

import pathlib
import re

import jax
import tqdm

from mc_jax.errors import ConfigError

FOLDER = "profile"


def parse(text: str) -> range:
  """The steps of a text: 10, 11, 12 of "10-12", 10 of "10".

  Raises:
    ConfigError: The text has another form.
  """
  match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
  if match:
    first, last = int(match[1]), int(match[2] or match[1])
    if 1 <= first <= last:
      return range(first, last + 1)
  raise ConfigError(f"--profile must be steps such as 10-12 or 10, counted from 1, got {text!r}")


class Trace:
  """Traces `steps` into the workdir; TensorBoard, Perfetto and xprof read the result."""

  def __init__(self, steps: range, workdir: pathlib.Path):
    self._steps = steps
    self._folder = workdir / FOLDER
    self._running = False

  def before(self, step: int) -> None:
    """Must be called before every step."""
    if step in self._steps and not self._running:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step: int, results: object) -> None:
    """Must be called after every step, with arrays that the step computes."""
    if self._running and step + 1 not in self._steps:
      jax.block_until_ready(results)
      self.close()

  def close(self) -> None:
    """Ends a trace that is running."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      tqdm.tqdm.write(f"a trace of the steps is in the workdir, under {FOLDER}")  # does not break a progress bar

  def __enter__(self) -> Trace:
    return self

  def __exit__(self, *_) -> None:
    self.close()
