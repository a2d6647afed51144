"""Stopping between two steps on Ctrl-C or a scheduler's SIGTERM, so that nothing is lost."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator


class Interrupt:
  """Whether the process was asked to stop, and by which signal."""

  signal: signal.Signals | None = None

  def __bool__(self) -> bool:
    return self.signal is not None


@contextlib.contextmanager
def deferred() -> Iterator[Interrupt]:
  """Within it, SIGINT and SIGTERM are noted instead of obeyed; the second one is obeyed."""
  interrupt = Interrupt()
  if threading.current_thread() is not threading.main_thread():
    yield interrupt  # only the main thread may set handlers
    return

  def note(number: int, _) -> None:
    if interrupt:
      raise KeyboardInterrupt
    interrupt.signal = signal.Signals(number)
    print("\nstopping after this step, with a checkpoint; again to stop at once", file=sys.stderr)

  previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield interrupt
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
