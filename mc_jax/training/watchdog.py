"""Ends a process that hangs and prints where; prints a heartbeat during work that is slow."""

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

_HELD = 1.5  # times the limit: by then the interpreter's lock must be held, and only C code can run


class Watchdog:
  """Prints every thread's stack and ends the process with status 1 if `finished` is not called for too long.

  The same command, given again, resumes from the last checkpoint.

  Args:
    minutes: Longest time between two calls of `finished`; 0: the process is never ended.
  """

  def __init__(self, minutes: float):
    self._seconds = 60 * minutes
    self._closed = threading.Event()
    self._deadline = float("inf")

  def finished(self) -> None:
    """Restarts the clock: a step, an evaluation or a checkpoint has ended."""
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
          "Every thread's stack follows; the same command resumes from the last checkpoint",
          file=sys.__stderr__,
          flush=True,
        )
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        os._exit(1)


@contextlib.contextmanager
def heartbeat(work: str, every: float = 30.0, file: TextIO | None = None) -> Iterator[None]:
  """Prints "still compiling, for 1:30 now" at intervals while its block runs.

  Args:
    work: The work, such as "compiling".
    every: Seconds between two lines.
    file: Where to print them; default: standard output.
  """
  done, begin = threading.Event(), time.monotonic()

  def beat() -> None:
    while not done.wait(every):
      print(f"still {work}, for {duration(time.monotonic() - begin)} now", file=file, flush=True)

  thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
