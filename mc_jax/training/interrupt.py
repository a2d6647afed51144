"""Stopping between two steps on Ctrl-C or a scheduler's SIGTERM, so that nothing is lost.

A run that was stopped ends with the status 128 + the signal's number, 143 after SIGTERM, like a process that a signal
ends at once: that is what SIGTERM does before the first step and after the last checkpoint, when there is nothing to
lose.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Interrupt:
  """Whether the job was asked to stop, and by which signal."""

  signal: signal.Signals | None = None

  def stops_after(self, step: int) -> bool:
    """Whether the run ends with this step. All processes are told the same, if all ask after every step.

    A signal to any one of several processes stops them all. They may be some steps apart when it comes, and end with
    one that none has begun.
    """
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.signal = signal.SIGTERM
    return self.signal is not None


@contextlib.contextmanager
def deferred() -> Iterator[Interrupt]:
  """Within it, SIGINT and SIGTERM are noted instead of obeyed; the second one is obeyed.

  In a job of several processes SIGTERM is JAX's, whose handler tells the others; a SIGINT becomes one.
  """
  interrupt = Interrupt()
  several = jax.process_count() > 1
  noted = False
  if threading.current_thread() is not threading.main_thread():
    yield interrupt  # only the main thread may set handlers
    return

  def note(number: int, _) -> None:
    nonlocal noted
    if noted:
      raise KeyboardInterrupt
    noted = True
    print("\nstopping after this step, with a checkpoint; again to stop at once", file=sys.stderr)
    if several:
      signal.raise_signal(signal.SIGTERM)
    else:
      interrupt.signal = signal.Signals(number)

  previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)[: 1 if several else 2]}
  try:
    yield interrupt
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
