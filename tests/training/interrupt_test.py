"""Which signals stop a run after its step, and which stop it at once."""

import signal

import pytest

from mc_jax.training import interrupt

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture(autouse=True)
def handlers():
  """Puts back what a test leaves behind, and starts from a process that ignores nothing."""
  before = {number: signal.signal(number, signal.SIG_DFL) for number in interrupt.STOPPING}
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.mark.parametrize(
  ("sent", "at_once"),
  [
    ([INT], []),
    ([INT, INT], [INT]),
    ([TERM, INT, TERM], [INT, TERM]),
    ([HUP, HUP, HUP], []),  # a shell's, and the kernel's to its session
    ([TERM, HUP], []),  # the end of a session sends both
    ([HUP, TERM], []),
    ([HUP, TERM, TERM], [TERM]),
  ],
  ids=lambda numbers: "+".join(number.name for number in numbers),
)
def test_a_hangup_never_makes_a_second_signal(sent, at_once):
  first, again = [], []
  with interrupt.handled(first.append, again.append):
    for number in sent:
      signal.raise_signal(number)
  assert (first, again) == (sent[:1], at_once)
  assert signal.getsignal(TERM) == signal.SIG_DFL
  assert signal.getsignal(HUP) == (signal.SIG_IGN if HUP in sent else signal.SIG_DFL)


def test_nohup_stays_nohup():
  signal.signal(HUP, signal.SIG_IGN)
  with interrupt.deferred() as noted:
    signal.raise_signal(HUP)
    assert not noted.stops_after(1)
    signal.raise_signal(TERM)
    assert noted.stops_after(1)
  assert noted.signal == TERM
  assert signal.getsignal(HUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_a_run_stops_after_its_step_and_at_once_when_asked_again(number, capfd):
  with pytest.raises(KeyboardInterrupt) as raised, interrupt.deferred() as noted:
    signal.raise_signal(number)
    assert noted.stops_after(1)
    assert noted.signal == number
    assert "stopping after this step, with a checkpoint" in capfd.readouterr().err
    for _ in range(2):
      signal.raise_signal(TERM)
  assert raised.value.args == (TERM,)
