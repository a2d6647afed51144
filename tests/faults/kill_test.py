"""Killed or stopped at any moment, as often as you like: the losses are those of a run that nothing disturbed."""

import random
import signal
import time

import pytest

from mc_jax.training import metrics

PHASES = ("step", "save", "commit", "digests", "evaluation", "restore")  # see forks.py


@pytest.fixture(scope="module")
def config(tiny):
  return tiny(pattern="attention", steps=48, log_every=1, eval_every=2, checkpoint_every=2, warmup_steps=10)


@pytest.fixture(scope="module")
def undisturbed(config, forks, records, tmp_path_factory):
  """The records of a run that was left alone."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  forks.start(config, workdir)
  status, printed = forks.finish()
  assert status == 0, printed
  return records(workdir)


@pytest.mark.slow
def test_sigkill_at_20_random_moments(config, forks, records, undisturbed, tmp_path):
  choose, killed = random.Random(8), []
  phases = [*PHASES * 3, "step", "save"]
  choose.shuffle(phases)
  for phase in phases:
    forks.start(config, tmp_path)
    if phase == "restore" and not (tmp_path / "checkpoints").exists():
      phase = "step"
    times = 1 if phase == "restore" else choose.randint(1, 2)
    assert forks.wait_for(f"phase {phase}", times), forks.finish()
    time.sleep(choose.uniform(0, 0.03))
    forks.kill()
    status, printed = forks.finish()
    assert status == -signal.SIGKILL, printed
    killed.append(phase)
  forks.start(config, tmp_path)
  status, printed = forks.finish()
  assert status == 0, printed
  assert len(killed) == 20
  assert set(killed) == set(PHASES)
  assert [record["step"] for record in undisturbed] == list(range(1, 49))
  assert records(tmp_path) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_stopped_at_5_random_moments(config, forks, records, undisturbed, tmp_path, number):
  """A terminal that closes sends its signal more than once."""
  choose, steps = random.Random(9), [0]
  for phase in ("step", "save", "evaluation", "digests", "commit"):
    forks.start(config, tmp_path)
    assert forks.wait_for(f"phase {phase}", choose.randint(2, 5))
    time.sleep(choose.uniform(0, 0.03))
    for _ in range(3 if number == signal.SIGHUP else 1):
      forks.kill(number)
    status, printed = forks.finish()
    assert status == 128 + number, printed
    steps.append(max(record["step"] for record in metrics.read(tmp_path)))
    assert (tmp_path / "checkpoints" / str(steps[-1])).is_dir()
  assert steps == sorted(set(steps))
  forks.start(config, tmp_path)
  status, printed = forks.finish()
  assert status == 0, printed
  # A run that was told to stop does not evaluate its last step.
  left_out = [dict(undisturbed[step - 1]) for step in steps[1:]]
  found = {record["step"]: record for record in records(tmp_path)}
  for record in undisturbed:
    again = found.pop(record["step"])
    assert record.items() >= again.items()
    assert again == record or (record in left_out and again["loss"] == record["loss"])
  assert not found
