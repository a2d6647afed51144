"""Stops a run between two steps on Ctrl-C, a scheduler's SIGTERM or a closed terminal's SIGHUP, so that nothing is
lost.

A stopped run exits with 128 + the signal's number, 143 after SIGTERM, like a process that the signal ends at once.
Before the first step and after the last checkpoint, when there is nothing to lose, SIGTERM does end the process at
once.
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
  """The signal that requested a stop, if one did."""

  signal: signal.Signals | None = None

  def stops_after(self, step: int) -> bool:
    """Whether the run ends with this step. All processes must call it after every step, and get the same answer.

    A signal to one of several processes stops them all, at a step that none of them has begun: they may be a few steps
    apart when it arrives.
    """
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.signal = signal.SIGTERM
    return self.signal is not None


@contextlib.contextmanager
def handled(
  first: Callable[[signal.Signals], None],
  again: Callable[[signal.Signals], None],
  numbers: tuple[signal.Signals, ...] = STOPPING,
) -> Iterator[None]:
  """Calls functions on signals that request a stop, while its block runs.

  SIGHUP never counts as a second signal, nor does a signal after it as one: a closing terminal sends several SIGHUPs,
  and the end of a session SIGTERM as well. An ignored SIGHUP, as under nohup, stays ignored; after a handled one, later
  ones are ignored.

  Args:
    first: Called with the first signal.
    again: Called with the second SIGINT or SIGTERM, and with later ones.
    numbers: The signals.
  """
  received: set[signal.Signals] = set()

  def note(number: int, _) -> None:
    number, earlier = signal.Signals(number), frozenset(received)
    received.add(number)
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
      signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP and number in received else handler)


def print_line(text: str) -> None:
  """Prints a line on standard error from a signal handler, which may have interrupted another print."""
  with contextlib.suppress(OSError):
    os.write(2, f"{text}\n".encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def deferred() -> Iterator[Interrupt]:
  """Records the first signal that requests a stop while its block runs, and raises KeyboardInterrupt on the second.

  In a job of several processes JAX handles SIGTERM and notifies the others; SIGINT and SIGHUP are turned into it.
  """
  interrupt = Interrupt()
  several = jax.process_count() > 1
  if threading.current_thread() is not threading.main_thread():
    yield interrupt  # only the main thread can set handlers
    return

  def first(number: signal.Signals) -> None:
    print_line("\nstopping after this step, with a checkpoint; again to stop at once")
    if several:
      signal.raise_signal(signal.SIGTERM)
    else:
      interrupt.signal = number

  def again(number: signal.Signals) -> None:
    raise KeyboardInterrupt(number)

  with handled(first, again, tuple(number for number in STOPPING if not (several and number == signal.SIGTERM))):
    yield interrupt
