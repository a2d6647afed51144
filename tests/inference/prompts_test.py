"""Saved prompts: what is loaded is what was saved, and by the same model."""

import dataclasses
import functools
import types

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from mc_jax.data import lock
from mc_jax.errors import ConfigError
from mc_jax.inference import Decoder, Request, prompts
from mc_jax.models import CacheConfig, LanguageModel, MemoryConfig, ModelConfig
from mc_jax.parallel import mesh as meshes
from mc_jax.parallel.mesh import MeshConfig

PROMPT = np.arange(11) % 16


@functools.cache
def decoder(seed=0, cache=None, mesh=None, **memory):
  memory = MemoryConfig(**({"rule": "swla", "aggregation": "ssc", "chunk": 2, "segment_length": 4} | memory))
  config = ModelConfig(vocab_size=16, layers=1, d_model=16, heads=2, mlp_dim=16, memory=memory)
  graph, params = nnx.split(LanguageModel(config, nnx.Rngs(seed)))
  return Decoder(config, graph, nnx.to_pure_dict(params), cache or CacheConfig(40, dtype="int8"), mesh)


def continued(decoder, start):
  blocks = decoder.generate([Request(PROMPT[:3], 12, seed=5)], start=start)
  return np.concatenate(list(blocks), axis=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """(folder, logits, cache as numpy)."""
  folder = tmp_path_factory.mktemp("prompts") / "saved"
  start = decoder().prefill([PROMPT])
  prompts.save(folder, decoder(), *start)
  return folder, *jax.device_get(start)


def test_what_is_loaded_goes_on_as_what_was_saved(saved):
  folder, logits, cache = saved
  assert prompts.cache_config(folder) == decoder().cache
  loaded = prompts.load(folder, decoder())
  chex.assert_trees_all_equal(jax.device_get(loaded), (logits, cache))
  np.testing.assert_array_equal(continued(decoder(), loaded), continued(decoder(), decoder().prefill([PROMPT])))


def test_a_prompt_of_a_model_with_a_mixer_is_read(saved, tmp_path, monkeypatch):
  """As all were saved before models had patterns: the cache of equal layers was in no tuple."""

  def as_it_was(config):
    tree = dataclasses.asdict(config)
    if isinstance(config, ModelConfig):
      del tree["pattern"], tree["feed_forward"]
      tree |= {"mixer": "memory_caching", **tree.pop("attention")}
    return tree

  _, logits, cache = saved
  with monkeypatch.context() as patched:
    patched.setattr(prompts, "dataclasses", types.SimpleNamespace(asdict=as_it_was))
    prompts.save(tmp_path / "old", decoder(), logits, cache._replace(layers=cache.layers[0]))
  chex.assert_trees_all_equal(jax.device_get(prompts.load(tmp_path / "old", decoder())), (logits, cache))


@pytest.mark.slow
def test_on_another_mesh(saved):
  mesh = meshes.make(MeshConfig(data=1, model=2), jax.devices()[:2])
  loaded = prompts.load(saved[0], decoder(mesh=mesh))
  for x in jax.tree.leaves(loaded[1].slots):
    assert x.sharding.shard_shape(x.shape)[2] == x.shape[2] // 2  # heads
  np.testing.assert_array_equal(
    continued(decoder(mesh=mesh), loaded), continued(decoder(), prompts.load(saved[0], decoder()))
  )


@pytest.mark.slow
def test_one_row_fills_a_mesh(saved):
  mesh = meshes.make(MeshConfig(data=2), jax.devices()[:2])
  loaded = prompts.load(saved[0], decoder(mesh=mesh))
  np.testing.assert_array_equal(
    continued(decoder(mesh=mesh), loaded), continued(decoder(), prompts.load(saved[0], decoder()))
  )


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"data": 1, "model": 2}], ids=str)
def test_into_host_memory(tmp_path, sizes):
  mesh = meshes.make(MeshConfig(**sizes), jax.devices()[:2]) if sizes else None
  here = decoder(cache=CacheConfig(40, memory="host"), mesh=mesh)
  start = here.prefill([PROMPT])
  prompts.save(tmp_path / "saved", here, *start)
  loaded = prompts.load(tmp_path / "saved", here)
  assert loaded[1].slots[0]["memories"].pages.sharding.memory_kind == "pinned_host"
  np.testing.assert_array_equal(continued(here, loaded), continued(here, start))


def test_another_models_prompt_is_refused(saved):
  folder = saved[0]
  with pytest.raises(ConfigError, match=r"model.memory.segment_length: 4 then, 8 now"):
    prompts.load(folder, decoder(segment_length=8))
  with pytest.raises(ConfigError, match="the parameters: their checksums differ"):
    prompts.load(folder, decoder(seed=1))
  with pytest.raises(ConfigError, match=r"the cache: .*'tokens': 40.* then, .*'tokens': 44"):
    prompts.load(folder, decoder(cache=CacheConfig(44, dtype="int8")))
  prompts.load(folder, decoder(implementation="xla"))  # which changes no number


def test_what_is_not_there_is_named(saved, tmp_path):
  with pytest.raises(ConfigError, match="nowhere does not exist"):
    prompts.load(tmp_path / "nowhere", decoder())
  with pytest.raises(ConfigError, match="has no saved prompt"):
    prompts.cache_config(tmp_path)
  with pytest.raises(ConfigError, match="exists already"):
    prompts.save(saved[0], decoder(), *saved[1:])


def test_two_that_save_at_once_do_not_mix(saved, tmp_path):
  with (
    lock.take(tmp_path, "", "", ".new.lock"),
    pytest.raises(OSError, match=rf"another process saves new in {tmp_path}"),
  ):
    prompts.save(tmp_path / "new", decoder(), *saved[1:])
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_checksum_sees_every_bit_and_place():
  params = decoder().params
  leaves, tree = jax.tree.flatten(params)
  expected = prompts.checksum(params)
  assert expected == prompts.checksum(jax.tree.map(np.asarray, params))
  for i, leaf in enumerate(leaves):
    changed = np.array(leaf)
    changed.view(np.uint32).flat[-1] ^= 1
    assert prompts.checksum(tree.unflatten([*leaves[:i], changed, *leaves[i + 1 :]])) != expected
  swapped = np.array(leaves[0])
  swapped.flat[[0, 1]] = swapped.flat[[1, 0]]
  assert prompts.checksum(tree.unflatten([swapped, *leaves[1:]])) != expected
