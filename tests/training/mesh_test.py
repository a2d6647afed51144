"""Training on a mesh is training on one device, in parts; what a mesh does not divide is named."""

import dataclasses

import jax
import numpy as np
import pytest
from marks import slow

from mc_jax.data import windows
from mc_jax.errors import ConfigError
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.training import state, step

MESHES = {
  "data": MeshConfig(data=8),
  "fsdp": MeshConfig(data=1, fsdp=8),
  "model": MeshConfig(data=1, model=2),
  "data, fsdp and model": MeshConfig(data=2, fsdp=2, model=2),
}


def _batch(config, mesh):
  random = np.random.default_rng(0)
  shape = (config.data.batch_size, config.data.length)
  batch = {
    "tokens": random.integers(0, 256, shape).astype(np.int32),
    "targets": random.integers(0, 256, shape).astype(np.int32),
    "weights": (random.random(shape) < np.linspace(0.1, 1, shape[0])[:, None]).astype(np.float32),
  }
  return windows.place(batch, windows.shapes(config.data, mesh))


def _two_steps(config, devices):
  """(state, values of both steps), and the bytes of the state on the first device."""
  mesh = config.check().make_mesh(jax.devices()[:devices])
  current, update = state.create(config, mesh), step.lower(config, mesh).compile()
  values = []
  for _ in range(2):
    current, scalars = update(current, _batch(config, mesh))
    values.append(scalars)
  assert state.shardings(current) == state.shardings(state.abstract(config, mesh))
  held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(current))
  return jax.device_get((current, values)), held


@pytest.fixture(scope="module")
def config(tiny):
  # With so large an epsilon Adam's updates are as smooth as the gradients: no sign of a tiny one decides.
  return tiny(pattern="attention", batch_size=8, warmup_steps=0, epsilon=1e-2)


@pytest.fixture(scope="module")
def alone_after_two_steps(config):
  return _two_steps(config, 1)


@pytest.mark.parametrize("name", [slow("data"), slow("fsdp"), slow("model"), "data, fsdp and model"])
def test_losses_gradients_and_parameters_are_those_of_one_device(config, alone_after_two_steps, name):
  mesh = MESHES[name]
  devices = mesh.data * mesh.fsdp * mesh.model
  after, held = _two_steps(dataclasses.replace(config, mesh=mesh), devices)
  expected, whole = alone_after_two_steps
  _assert_close(after, expected)
  # All but the norms' scales and the scalars is split by every axis but "data".
  assert held == pytest.approx(whole / (mesh.fsdp * mesh.model), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [{}, {"rule": "mamba2", "value_heads": 4}, {"rule": "kda"}], ids=str)
def test_memories_and_microbatches_too(tiny, memory):
  config = _memory(tiny(batch_size=8, microbatches=2, warmup_steps=0, epsilon=1e-2), **memory)
  expected, _ = _two_steps(config, 1)
  after, _ = _two_steps(dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=2, context=2, model=2)), 8)
  _assert_close(after, expected)


def _assert_close(found, expected):
  """Every array within 1e-5 of its largest entry."""
  for path, a in jax.tree_util.tree_leaves_with_path(expected):
    b = dict(jax.tree_util.tree_leaves_with_path(found))[path]
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max(), err_msg=jax.tree_util.keystr(path))


def _memory(config, **fields):
  memory = dataclasses.replace(config.model.memory, **fields)
  return dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory))


@pytest.mark.parametrize(
  ("mesh", "fields", "message"),
  [
    (MeshConfig(data=3), {}, "mesh.data=3 x mesh.fsdp=1 x mesh.context=1 x mesh.model=1 does not fit 8 device"),
    (MeshConfig(model=3), {}, "mesh.model=3 does not fit 8 device"),
    (MeshConfig(), {}, "data.batch_size=4 is not divisible by mesh.data=8 x mesh.fsdp=1 = 8: use a multiple of 8"),
    (
      MeshConfig(data=2, model=4),
      {"microbatches": 4},
      "data.batch_size=4 / train.microbatches=4 = 1 is not divisible by mesh.data=2 x mesh.fsdp=1 = 2",
    ),
    (MeshConfig(data=2, model=4), {}, "model.heads=2 is not divisible by mesh.model=4: use a multiple of 4, or a mesh"),
    (MeshConfig(model=8), {"mlp_dim": 20}, "model.mlp_dim=20 is not divisible by mesh.model=8"),
    (MeshConfig(model=8), {"vocab_size": 257}, "model.vocab_size=257 is not divisible by mesh.model=8"),
    (MeshConfig(fsdp=2, context=4), {"d_model": 20}, "model.d_model=20 is not divisible by mesh.fsdp=2 x mesh.conte"),
    (
      MeshConfig(context=8),
      {},
      "data.length=16 has 2 segments of model.memory.segment_length=8, which do not divide among mesh.context=8: "
      "use a data.length that is a multiple of 64, another model.memory.segment_length, "
      "or a mesh.context that is one of 1, 2",
    ),
    (MeshConfig(context=2, data=4), {"length": 20}, "data.length=20 has 2 whole segments"),
    (MeshConfig(context=8), {"pattern": "attention", "length": 20}, "data.length=20 is not divisible by mesh.conte"),
  ],
)
def test_what_a_mesh_does_not_divide_is_named(tiny, mesh, fields, message):
  config = dataclasses.replace(tiny(**fields), mesh=mesh).check()
  with pytest.raises(ConfigError) as raised:
    config.check_devices(8)
  assert message in str(raised.value)


def test_context_needs_segments_of_one_length(tiny):
  config = dataclasses.replace(_memory(tiny(), segmentation="logarithmic"), mesh=MeshConfig(context=2, data=4))
  with pytest.raises(
    ConfigError, match=r"mesh\.context=2 needs model\.memory\.segmentation='constant', got 'logarithmic'"
  ):
    config.check_devices(8)


def test_a_mesh_that_divides_everything_is_made(tiny):
  config = dataclasses.replace(tiny(), mesh=MeshConfig(context=2, model=2))
  assert config.check_devices(8) == {"data": 2, "fsdp": 1, "context": 2, "model": 2}
  assert dict(config.make_mesh(jax.devices()).shape) == config.check_devices(8)
  assert MeshConfig(data=0, fsdp=-1).problems() == [
    "mesh.data=0 must be at least 1, or -1 for all the devices that are left"
  ]
