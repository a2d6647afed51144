"""Stopping between two steps on Ctrl-C, a scheduler's SIGTERM or a closed terminal's SIGHUP, so that nothing is lost.

A run that was stopped ends with the status 128 + the signal's number, 143 after SIGTERM, like a process that a signal
ends at once: that is what SIGTERM does before the first step and after the last checkpoint, when there is nothing to
lose.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
def heard(
  first: Callable[[signal.Signals], None],
  again: Callable[[signal.Signals], None],
  numbers: tuple[signal.Signals, ...] = STOPPING,
) -> Iterator[None]:
  """Within it, signals that ask the process to stop call a function instead.

  A SIGHUP never makes a second signal of itself or of another: a terminal that closes sends several, and the end of a
  session SIGTERM beside it. One that is ignored stays ignored, as nohup has it; after one that was heard, the rest are.

  Args:
    first: Called with the first signal.
    again: Called with the second SIGINT or SIGTERM, and those after it.
    numbers: The signals.
  """
  came: set[signal.Signals] = set()

  def note(number: int, _) -> None:
    number, earlier = signal.Signals(number), frozenset(came)
    came.add(number)
    if not earlier:
      first(number)
    elif number != signal.SIGHUP and earlier - {signal.SIGHUP}:
      again(number)

  nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  previous = {number: signal.signal(number, note) for number in numbers if not (number == signal.SIGHUP and nohup)}
  try:
    yield
  finally:
    for number, handler in previous.items():
      signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP and number in came else handler)


def tell(text: str) -> None:
  """Prints a line on standard error from a signal's handler, which may have interrupted another print."""
  with contextlib.suppress(OSError):
    os.write(2, f"{text}\n".encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def deferred() -> Iterator[Interrupt]:
  """Within it, signals that ask to stop are noted instead of obeyed; the second one is obeyed.

  In a job of several processes SIGTERM is JAX's, whose handler tells the others; SIGINT and SIGHUP become one.
  """
  interrupt = Interrupt()
  several = jax.process_count() > 1
  if threading.current_thread() is not threading.main_thread():
    yield interrupt  # only the main thread may set handlers
    return

  def first(number: signal.Signals) -> None:
    tell("\nstopping after this step, with a checkpoint; again to stop at once")
    if several:
      signal.raise_signal(signal.SIGTERM)
    else:
      interrupt.signal = number

  def again(number: signal.Signals) -> None:
    raise KeyboardInterrupt(number)

  with heard(first, again, tuple(number for number in STOPPING if not (several and number == signal.SIGTERM))):
    yield interrupt
