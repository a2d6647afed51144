"""A model's prefill and steps against its forward pass."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marks import slow
from quick_compile import jit

from mc_jax.models import CacheConfig, LanguageModel, MemoryConfig, ModelConfig, attention
from mc_jax.models import cache as cache_lib
from mc_jax.parallel import mesh as meshes
from mc_jax.parallel.mesh import MeshConfig

LENGTH, LENGTHS = 18, np.array([1, 4, 9, 13])


def tiny(**options):
  memory = MemoryConfig(**({"chunk": 2, "segment_length": 4, "expansion": 2} | options.pop("memory", {})))
  sizes = {"vocab_size": 16, "layers": 2, "d_model": 16, "heads": 2, "mlp_dim": 16, "conv_width": 3, "max_length": 24}
  return ModelConfig(**(sizes | options), memory=memory)


def model_of(config):
  return nnx.split(LanguageModel(config, nnx.Rngs(0)))


def tokens_of(config, batch=4):
  return np.random.default_rng(0).integers(0, config.vocab_size, (batch, LENGTH)).astype(np.int32)


def continued(graph, params, tokens, lengths, cache_config):
  """Prompts of `lengths` [b], then steps to the end: logits [b, length, vocab] from the prompt's last token on."""
  model = nnx.merge(graph, params)
  rows = jnp.arange(len(tokens))
  first, cache = model.prefill(tokens, cache_config, lengths)
  logits = jnp.zeros((*tokens.shape, first.shape[-1])).at[rows, lengths - 1].set(first)

  def body(_, carry):
    logits, cache = carry
    active = cache.position < LENGTH
    at = jnp.where(active, cache.position, LENGTH)
    new, cache = model.step(tokens[rows, jnp.minimum(at, LENGTH - 1)], cache, cache_config, active)
    return logits.at[rows, at].set(new, mode="drop"), cache

  return jax.lax.fori_loop(0, LENGTH - lengths.min(), body, (logits, cache))


def check(config, *, tolerance=1e-4, mesh=None, **cache):
  graph, params = model_of(config)
  tokens = tokens_of(config)
  expected = jit(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, tokens)
  run = jit(functools.partial(continued, graph, cache_config=CacheConfig(LENGTH, **cache)))
  with jax.set_mesh(mesh) if mesh is not None else jax.default_matmul_precision("highest"):
    found, cache = run(params, tokens, LENGTHS)
  for row, length in enumerate(LENGTHS):
    chex.assert_trees_all_close(found[row, length - 1 :], expected[row, length - 1 :], rtol=tolerance, atol=tolerance)
  np.testing.assert_array_equal(cache.position, LENGTH)
  return cache


@pytest.mark.parametrize(
  "options",
  [
    slow({"rule": "titans", "aggregation": "grm"}),
    {"rule": "swla", "aggregation": "ssc", "carry": "independent"},
    slow({"rule": "dla", "aggregation": "soup", "gate": "token"}),
    slow({"rule": "linear", "aggregation": "none"}),
    slow({"rule": "titans", "aggregation": "none", "after_training": "moving_average"}),
  ],
  ids=str,
)
def test_a_model_decodes_what_it_computes(options):
  check(tiny(memory=options))


@pytest.mark.parametrize(
  "tile", [slow(1024), slow(9), 4]
)  # one tile, two, and five of which the last lies over the fourth
def test_the_transformer_decodes_what_it_computes(monkeypatch, tile):
  monkeypatch.setattr(attention, "_TILE", tile)
  check(tiny(pattern="attention"))


@pytest.mark.parametrize(
  "options",
  [
    {"pattern": "attention"},
    slow({"memory": {"aggregation": "ssc"}}),
    slow({"memory": {"rule": "mamba2", "value_heads": 4}}),
    slow({"memory": {"rule": "retnet"}}),
  ],
  ids=str,
)
def test_decoding_on_a_mesh(options):
  mesh = meshes.make(MeshConfig(data=2, fsdp=2, model=2), jax.devices())
  check(tiny(**options), mesh=mesh)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "model": 2}], ids=str)
def test_decoding_from_host_memory(sizes):
  mesh = meshes.make(MeshConfig(**sizes), jax.devices()) if sizes else None
  cache = check(tiny(memory={"rule": "linear", "aggregation": "ssc"}), mesh=mesh, memory="host")
  pages = cache.slots[0]["memories"].pages
  assert pages.sharding.memory_kind == "pinned_host"
  assert pages.sharding.shard_shape(pages.shape)[1:3] == ((1, 1) if sizes else (4, 2))  # rows and heads
  repeated = cache_lib.repeat(cache, 3).slots[0]["memories"].pages
  assert repeated.sharding.memory_kind == "pinned_host"
  np.testing.assert_array_equal(repeated, np.repeat(pages, 3, axis=1))


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({"memory": {"aggregation": "grm"}}, "model.memory.aggregation='ssc'"),
    ({"pattern": "attention"}, "model.pattern with memory"),
  ],
  ids=str,
)
def test_what_reads_all_states_does_not_read_them_from_host_memory(options, expected):
  (problem,) = CacheConfig(LENGTH, memory="host").problems(tiny(**options))
  assert "cache.memory='host'" in problem
  assert expected in problem


def test_memories_have_names():
  (problem,) = CacheConfig(LENGTH, memory="disk").problems(tiny(memory={"aggregation": "ssc"}))
  assert problem == "cache.memory='disk' is not one of device, host"


@pytest.mark.parametrize("place", ["device", slow("host")])
def test_an_empty_cache_is_that_of_no_prompt(place):
  config, cache_config = tiny(memory={"rule": "linear", "aggregation": "ssc"}), CacheConfig(LENGTH, memory=place)
  graph, params = model_of(config)
  tokens = tokens_of(config)

  @jit
  def by_steps(params, tokens):
    model = nnx.merge(graph, params)
    cache, logits = model.init_cache(cache_config, len(tokens)), None
    for i in range(3):
      logits, cache = model.step(tokens[:, i], cache, cache_config)
    return logits, cache

  logits, cache = by_steps(params, tokens)
  expected, prefilled = jit(lambda params, tokens: nnx.merge(graph, params).prefill(tokens, cache_config))(
    params, tokens[:, :3]
  )
  chex.assert_trees_all_close(logits, expected, rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_equal_shapes_and_dtypes(cache, prefilled)
