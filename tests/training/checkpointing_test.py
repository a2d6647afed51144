"""A checkpoint gives everything back, and is refused to another model."""

import dataclasses
import pathlib

import chex
import jax
import jax.numpy as jnp
import pytest

from mc_jax.data import datasets
from mc_jax.errors import ConfigError
from mc_jax.models import MemoryConfig
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.training import config as config_lib
from mc_jax.training import state
from mc_jax.training.checkpointing import Checkpoints, changed


def _batches(config, mesh):
  return datasets.load(config.data).batches(mesh)


def test_state_data_and_configuration_come_back(tiny, alone, tmp_path):
  config = tiny(pattern="attention")
  data, start = _batches(config, alone), state.create(config, alone)
  next(data)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.latest() is None
    checkpoints.save(1, start, data, config)
    checkpoints.save(1, start, data, config)  # the same step again is no error
  following = next(data)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    step = checkpoints.latest()
    again = _batches(config, alone)
    restored = checkpoints.restore(step, state.abstract(config, alone), again)
    stored = checkpoints.config(step)
  assert step == 1
  chex.assert_trees_all_equal(restored, start)
  chex.assert_trees_all_equal(next(again), following)
  assert config_lib.from_dict(stored) == config
  assert isinstance(restored.step, jax.Array)


def test_what_8_devices_wrote_1_2_and_4_read_exactly(tiny, tmp_path):
  config = dataclasses.replace(tiny(pattern="attention", batch_size=8), mesh=MeshConfig(data=2, fsdp=2, model=2))
  mesh = config.make_mesh()
  lies = state.shardings(state.abstract(config, mesh))
  distinct = jax.jit(lambda tree: jax.tree.map(lambda x: x + jnp.arange(x.size).reshape(x.shape).astype(x.dtype), tree))
  saved, data = jax.device_put(distinct(state.create(config, mesh)), lies), _batches(config, mesh)
  next(data)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(7, saved, data, config)
  following = jax.device_get(next(data))
  meshes = {
    1: MeshConfig(),
    2: MeshConfig(model=2),
    4: MeshConfig(data=2, fsdp=2),
    8: MeshConfig(data=1, fsdp=4, context=2),
  }
  for devices, sizes in meshes.items():
    other = dataclasses.replace(config, mesh=sizes)
    mesh = other.make_mesh(jax.devices()[:devices])
    target, again = state.abstract(other, mesh), _batches(other, mesh)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
      restored = checkpoints.restore(7, target, again)
      fields = changed(config_lib.from_stored(checkpoints.config(7)), other, tmp_path)
    assert state.shardings(restored) == state.shardings(target)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(saved))
    chex.assert_trees_all_equal(jax.device_get(next(again)), following)
    assert fields and all(name.startswith("mesh.") for name in fields)


def test_only_the_newest_are_kept(tiny, alone, tmp_path):
  config = tiny(pattern="attention")
  data, start = _batches(config, alone), state.create(config, alone)
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, start, data, config)
  assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [2, 3]


def test_another_model_is_refused_with_what_differs(tiny):
  memory = dataclasses.replace(tiny().model.memory, top_k=3)
  with pytest.raises(ConfigError) as raised:
    changed(tiny(), tiny(layers=2, memory=memory, steps=7), pathlib.Path("runs/x"))
  message = str(raised.value)
  assert "runs/x holds a checkpoint of another model" in message
  assert "model.layers: 1 in the checkpoint, 2 now" in message
  assert "model.memory.top_k: 2 in the checkpoint, 3 now" in message
  assert "steps" not in message


def test_other_fields_may_change_and_new_ones_have_their_defaults(tiny):
  stored = dataclasses.asdict(tiny())
  del stored["model"]["attention"]  # as if saved before there was such a field
  assert changed(config_lib.from_stored(stored), tiny(steps=7), pathlib.Path("x")) == {"train.steps": (6, 7)}


def test_a_gate_that_nothing_reads_makes_no_other_model(tiny):
  memory = MemoryConfig(rule="linear", aggregation="residual", chunk=4, segment_length=8)
  stored = tiny(memory=dataclasses.replace(memory, gate="sigmoid"))
  assert set(changed(stored, tiny(memory=memory), pathlib.Path("x"))) == {"model.memory.gate"}
  stored = tiny(memory=dataclasses.replace(memory, gate="sigmoid", aggregation="grm"))
  with pytest.raises(ConfigError, match=r"model\.memory\.gate"):
    changed(stored, tiny(memory=dataclasses.replace(memory, aggregation="grm")), pathlib.Path("x"))
