"""Numbers that are not finite: their updates are skipped; a run that meets too many ends with what repeats the last."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mc_jax.data import datasets, loader
from mc_jax.errors import ConfigError
from mc_jax.models import token_gates
from mc_jax.training import faulty, loop, metrics, replay, state, step


def _train(config, workdir):
  return loop.train(config, workdir, devices=jax.devices()[:1])


def _replay(config, workdir, step):
  """The rows of the table."""
  table = replay.replay(config, workdir, step, devices=jax.devices()[:1])
  return dict(re.split("  +", line.strip(), maxsplit=1) for line in table.splitlines()[1:])


def _checkpoints(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def _poisoned(monkeypatch, steps):
  """Batches of these steps have a NaN in row 2."""
  draw = loader.Batches.__next__

  def poisoned(self):
    batch = draw(self)
    if self.position // batch["tokens"].shape[0] in steps:
      batch["weights"] = batch["weights"].at[2, 5].set(jnp.nan)
    return batch

  monkeypatch.setattr(loader.Batches, "__next__", poisoned)


@pytest.fixture(scope="module")
def setting(tiny, alone):
  """A step, its state and a batch."""
  config = tiny(pattern="attention", max_skipped=2)
  return (
    jax.jit(step.train_step(config, alone)),
    state.create(config, alone),
    next(datasets.load(config.data).batches(alone)),
  )


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_bad_batch_updates_nothing_and_a_good_one_goes_on(setting, value):
  update, start, batch = setting
  bad = batch | {"weights": batch["weights"].at[0, 0].set(value)}
  after, values = update(start, bad)
  assert (int(after.step), int(after.skipped), int(values["skipped"])) == (1, 1, 1)
  chex.assert_trees_all_equal(after.params, start.params)
  chex.assert_trees_all_equal(after.opt_state[1][0].mu, start.opt_state[1][0].mu)
  chex.assert_trees_all_equal(after.opt_state[1][0].nu, start.opt_state[1][0].nu)
  following, values = update(after, batch)
  assert (int(following.step), int(following.skipped), int(values["skipped"])) == (2, 0, 0)
  assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (following.params, start.params)), strict=True))


def test_parameters_that_are_not_finite_stay_as_they_are(setting):
  update, start, batch = setting
  of_nan = dataclasses.replace(start, params=jax.tree.map(lambda x: x * jnp.nan, start.params))
  after, values = update(of_nan, batch)
  assert int(values["skipped"]) == 1
  assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(after.params))


def test_once_too_many_were_skipped_nothing_changes_any_more(setting):
  update, start, batch = setting
  bad = batch | {"weights": batch["weights"] * jnp.nan}
  after, _ = update(update(start, bad)[0], bad)
  assert int(after.skipped) == 2
  frozen, values = update(after, batch)  # a good one, that came before the loop has looked
  assert int(values["skipped"]) == 3
  chex.assert_trees_all_equal(frozen.params, start.params)


@pytest.mark.slow
def test_a_bad_batch_is_told_and_passed_and_no_checkpoint_is_made_of_it(tiny, tmp_path, monkeypatch, capsys):
  _poisoned(monkeypatch, {3})
  result = _train(tiny(pattern="attention", keep_every=3, log_every=2), tmp_path)
  records = {record["step"]: record for record in metrics.read(tmp_path)}
  assert list(records) == [1, 2, 3, 4, 5, 6]
  assert records[3]["skipped"] == 1
  assert "loss" not in records[3]
  assert not any("skipped" in records[other] for other in (1, 2, 4, 5, 6))
  assert np.isfinite(result.validation_bits)
  assert "step 3: the loss or its gradient is not finite, on rows 8 to 11 of the run" in capsys.readouterr().out
  assert _checkpoints(tmp_path) == [4, 6]


def test_too_many_bad_batches_end_the_run_with_a_step_to_replay(tiny, tmp_path, monkeypatch):
  """They are seen two steps late; the state is that before the first of them all the same."""
  config = tiny(pattern="attention", max_skipped=2, steps=8, log_every=8, eval_every=8, checkpoint_every=4)
  _poisoned(monkeypatch, {5, 6})
  with pytest.raises(metrics.Diverged) as raised:
    _train(config, tmp_path)
  message = str(raised.value)
  assert "step 6: the loss or its gradient is not finite, on rows 20 to 23 of the run" in message
  assert "2 updates in a row" in message
  assert f"{tmp_path / 'replay' / '6'}: the same command with --replay=6" in message
  assert _checkpoints(tmp_path) == [4]
  assert [record["step"] for record in metrics.read(tmp_path)] == list(range(1, 9))
  table = _replay(config, tmp_path, 6)
  assert (table["loss"], table["gradient's norm"]) == ("nan nats", "nan")
  assert (table["losses not finite"], table["parameters not finite"]) == ("row 2 of 4", "none")
  assert "blocks.mixer.key.kernel" in table["gradients not finite"]
  with pytest.raises(ConfigError, match=r"--replay=5: .*; there are 6"):
    _replay(config, tmp_path, 5)
  with pytest.raises(ConfigError, match="another model"):
    _replay(tiny(pattern="attention", layers=2), tmp_path, 6)


@pytest.mark.slow
def test_a_parameter_that_is_not_finite_is_named(tiny, tmp_path, monkeypatch):
  config, create = tiny(pattern="attention", max_skipped=2), state.create

  def broken(*arguments):
    start = create(*arguments)
    start.params["norm"]["scale"] = start.params["norm"]["scale"].at[3].set(jnp.nan)
    return start

  monkeypatch.setattr(state, "create", broken)
  with pytest.raises(metrics.Diverged, match=r"step 2: .* 2 updates in a row"):
    _train(config, tmp_path)
  table = _replay(config, tmp_path, 2)
  assert table["parameters not finite"] == "norm.scale"
  assert _checkpoints(tmp_path) == []


@pytest.mark.slow
def test_the_inner_loop_that_is_not_finite_ends_the_run(tiny, tmp_path, monkeypatch):
  """A learning rate of the memory is NaN at one token of one row."""
  memory = dataclasses.replace(tiny().model.memory, rule="titans")
  config, call = tiny(memory=memory, max_skipped=2), token_gates.TokenGates.__call__

  def broken(self, x):
    return {name: gate.at[1, 7].set(jnp.nan) for name, gate in call(self, x).items()}

  monkeypatch.setattr(token_gates.TokenGates, "__call__", broken)
  with pytest.raises(metrics.Diverged, match=r"step 2: .* 2 updates in a row"):
    _train(config, tmp_path)
  table = _replay(config, tmp_path, 2)
  assert (table["losses not finite"], table["parameters not finite"]) == ("row 1 of 4", "none")


def test_without_room_for_the_dump_the_step_is_told_all_the_same(setting, tiny, tmp_path, monkeypatch):
  _, start, batch = setting
  (tmp_path / "replay").write_text("in the way")
  told = replay.dump(epath.Path(tmp_path), 7, start, batch, tiny())
  assert told.startswith(f"Its state and batch could not be written to {tmp_path / 'replay' / '7'}: ")


def test_spikes_are_told_and_marked(tiny, capsys):
  watch = faulty.Faulty(tiny(), epath.Path("unused"), [{"step": s, "grad_norm": 1.0 + s % 3} for s in range(30)])
  records = [{"step": 30, "grad_norm": 15.0}, {"step": 31, "grad_norm": 50.0}, {"step": 32, "grad_norm": 1.0}]
  watch.look(records, None)
  assert records[0] == {"step": 30, "grad_norm": 15.0}
  assert records[1]["grad_norm_spike"] == 25.0
  assert "grad_norm_spike" not in records[2]
  printed = capsys.readouterr().out
  assert printed == "step 31: the gradient's norm is 50, 25 times the median of the last 31 steps\n"


def test_the_first_steps_have_nothing_to_be_compared_with(tiny, capsys):
  watch = faulty.Faulty(tiny(), epath.Path("unused"))
  watch.look([{"step": s, "grad_norm": 10.0**s} for s in range(20)], None)
  assert capsys.readouterr().out == ""
