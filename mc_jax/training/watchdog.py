"""Ends a process that hangs, and says where it does; tells that what is slow goes on."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

from mc_jax.training.progress import duration

_HELD = 1.5  # times the limit, after which the interpreter's lock is taken to be held: only C code gets to run then


class Watchdog:
  """Prints every thread's stack and ends the process with status 1 when nothing was finished for too long.

  The same command, given again, goes on from the last checkpoint.

  Args:
    minutes: between two calls of `finished`; 0: it never ends anything.
  """

  def __init__(self, minutes: float):
    self._seconds = 60 * minutes
    self._closed = threading.Event()
    self._deadline = float("inf")

  def finished(self) -> None:
    """Something was: a step, an evaluation, a checkpoint."""
    if self._seconds:
      self._deadline = time.monotonic() + self._seconds
      faulthandler.dump_traceback_later(_HELD * self._seconds, exit=True, file=sys.__stderr__)

  def __enter__(self) -> Watchdog:
    if self._seconds:
      self.finished()
      threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    self._closed.set()
    if self._seconds:
      faulthandler.cancel_dump_traceback_later()

  def _watch(self) -> None:
    while not self._closed.wait(max(0.0, self._deadline - time.monotonic())):
      if time.monotonic() >= self._deadline:
        print(
          f"error: no step, evaluation or checkpoint has ended for {duration(self._seconds)} (train.hang_minutes). "
          "Every thread's stack follows; the same command goes on from the last checkpoint",
          file=sys.__stderr__,
          flush=True,
        )
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        os._exit(1)


@contextlib.contextmanager
def telling(what: str, every: float = 30.0, file: TextIO | None = None) -> Iterator[None]:
  """Within it, reports every so many seconds that `what`, such as "compiling the training step", still goes on.

  Args:
    what: The work.
    every: Seconds between two lines.
    file: Where to print them; default: standard output.
  """
  done, begin = threading.Event(), time.monotonic()

  def tell() -> None:
    while not done.wait(every):
      print(f"still {what}, for {duration(time.monotonic() - begin)} now", file=file, flush=True)

  teller = threading.Thread(target=tell, name="telling", daemon=True)
  teller.start()
  try:
    yield
  finally:
    done.set()
    teller.join()
