"""A new run starts with the parameters of another one, if only how caches are read differs."""

import dataclasses

import chex
import jax
import pytest

from mc_jax.data import ConfigError
from mc_jax.training import loop, trained


def _read(config, **fields):
  memory = dataclasses.replace(config.model.memory, **fields)
  return dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory))


@pytest.fixture(scope="module")
def origin(tiny, tmp_path_factory):
  """A workdir whose model was trained without caches, and its configuration."""
  workdir, config = tmp_path_factory.mktemp("origin"), _read(tiny(steps=2), aggregation="none")
  loop.train(config, workdir, devices=jax.devices()[:1])
  return workdir, config


@pytest.mark.slow
def test_another_aggregation_is_put_on_parameters_when_asked_for(origin, tmp_path, capsys):
  workdir, config = origin
  optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-30)  # one step leaves them as they were
  train = dataclasses.replace(config.train, steps=1, start_from=str(workdir))
  new = _read(dataclasses.replace(config, optimizer=optimizer, train=train), aggregation="residual", segment_length=4)
  loop.train(new, tmp_path / "new", devices=jax.devices()[:1])
  printed = capsys.readouterr().out
  assert f"starting with the parameters of step 2 in {workdir}" in printed
  assert "model.memory.aggregation was 'none' there and is 'residual' here" in printed
  assert "model.memory.segment_length was 8 there and is 4 here" in printed
  ours, theirs = trained.load(tmp_path / "new"), trained.load(workdir)
  assert (ours.step, ours.config.model.memory.aggregation) == (1, "residual")
  chex.assert_trees_all_equal(ours.params, theirs.params)
  loop.train(new, tmp_path / "new", devices=jax.devices()[:1])  # goes on from its own checkpoint
  assert "starting with" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda config: _read(config, chunk=2), "model.memory.chunk: 4 in the checkpoint, 2 now"),
    (lambda config: _read(config, rule="swla"), "swla"),
    (lambda config: _read(config, aggregation="grm"), "aggregation"),  # needs a projection that there is not
  ],
  ids=["chunk", "rule", "connector"],
)
def test_what_is_more_than_reading_is_refused(origin, tmp_path, change, message):
  workdir, config = origin
  new = change(dataclasses.replace(config, train=dataclasses.replace(config.train, start_from=str(workdir))))
  with pytest.raises(ConfigError, match=message):
    loop.train(new, tmp_path / "new", devices=jax.devices()[:1])


@pytest.mark.slow
def test_in_its_own_workdir_a_run_does_not_change_its_aggregation(origin):
  workdir, config = origin
  with pytest.raises(
    ConfigError, match=r"aggregation: 'none' in the checkpoint, 'residual' now(.|\n)*train.start_from"
  ):
    loop.train(_read(config, aggregation="residual"), workdir, devices=jax.devices()[:1])
