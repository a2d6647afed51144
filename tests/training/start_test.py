"""A new run starts with the parameters of another one, if only how caches are read differs."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from flax import traverse_util

from mc_jax.errors import ConfigError
from mc_jax.parallel import mesh as meshes
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.training import config as config_lib
from mc_jax.training import loop, metrics, state, trained

CONNECTORS = "connectors (blocks/mixer/projection/kernel)"
AGE_SCORES = "age scores (blocks/mixer/age_scores/kernel)"
LACKS = "the checkpoint has no {}: they are initialised with train.seed"
HAS = "the checkpoint has {}: they are left out"


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


def _projection(params):
  """(the mixers' projections [layers, embed, 4 or 5, heads, head_dim], all other parameters), fetched."""
  flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
  return flat.pop("blocks/mixer/projection/kernel"), flat


@pytest.mark.slow
def test_connectors_that_the_checkpoint_lacks_start_anew(origin):
  workdir, config = origin
  overrides = {"model.memory.aggregation": "ssc", "train.seed": 5}
  config = config_lib.replace(config, overrides)
  mesh = meshes.make(MeshConfig(data=1, fsdp=2, model=2), jax.devices()[:4])
  found = trained.load(workdir, overrides, mesh=mesh, scores_may_differ=True)
  wanted = state.abstract(config, mesh).params
  chex.assert_trees_all_equal_shapes_and_dtypes(found.params, wanted)
  assert state.shardings(found.params) == state.shardings(wanted)
  ours, rest = _projection(found.params)
  theirs, their_rest = _projection(trained.load(workdir).params)
  fresh, _ = _projection(state.create(config, mesh).params)
  np.testing.assert_array_equal(ours[:, :, :4], theirs)
  np.testing.assert_array_equal(ours[:, :, 4:], fresh[:, :, 4:])
  assert ours.shape[2] == 5
  chex.assert_trees_all_equal(rest, their_rest)
  assert found.changes == (LACKS.format(CONNECTORS),)


def test_who_evaluates_gets_no_new_connectors(origin):
  with pytest.raises(ConfigError, match=r"aggregation: 'none' in the checkpoint, 'grm' requested"):
    trained.load(origin[0], {"model.memory.aggregation": "grm"})


@pytest.mark.slow
def test_connectors_and_age_scores_come_and_go(origin, tmp_path, capsys):
  """From none to grm and back, in steps that move nothing; and what gates by age would have."""
  workdir, config = origin
  config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-30))
  start, losses = workdir, []
  for aggregation, line in (("grm", LACKS.format(CONNECTORS)), ("none", HAS.format(CONNECTORS))):
    train = dataclasses.replace(config.train, steps=1, start_from=str(start))
    # Rows of one segment: there is nothing to read, and whatever reads answers alike.
    new = _read(dataclasses.replace(config, train=train), aggregation=aggregation, segment_length=16)
    start = tmp_path / aggregation
    loop.train(new, start, devices=jax.devices()[:1])
    assert line in capsys.readouterr().out
    losses.append(metrics.read(start)[0]["loss"])
  chex.assert_trees_all_equal(trained.load(start).params, trained.load(workdir).params)
  np.testing.assert_allclose(*losses, rtol=1e-6)
  by_age = {"model.memory.aggregation": "grm", "model.memory.gate": "token"}
  found = trained.load(tmp_path / "grm", by_age, scores_may_differ=True)
  assert found.changes == (LACKS.format(AGE_SCORES), HAS.format(CONNECTORS))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda config: _read(config, chunk=2), "model.memory.chunk: 4 in the checkpoint, 2 now"),
    (lambda config: _read(config, rule="swla"), "swla"),
    (lambda config: _read(config, aggregation="grm", rule="swla"), "swla"),
  ],
  ids=["chunk", "rule", "rule and connector"],
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
