"""The published layers around the memories: each as its publication has it, decoded, packed, on a mesh and learning."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marks import slow
from quick_compile import jit

from mc_jax import memory
from mc_jax.models import CacheConfig, LanguageModel, MemoryConfig, ModelConfig, forms
from mc_jax.models.forms import Form
from mc_jax.models.layer import Context
from mc_jax.models.memory_caching import MemoryCaching
from mc_jax.models.published_gates import Activated, Decay, Horizons, Sizes
from mc_jax.parallel import axes
from mc_jax.parallel import mesh as meshes
from mc_jax.parallel.mesh import MeshConfig

LENGTH, PROMPT = 10, 5

# A rule, and what is turned besides: each takes seconds to compile.
LAYERS = [
  slow("retnet", {}),
  ("mamba2", {"value_heads": 4}),
  slow("gla", {"key_dim": 2}),
  slow("deltanet", {"max_step": 2.0}),
  slow("gated_deltanet", {"value_heads": 4}),
  ("kda", {"aggregation": "ssc"}),
  slow("gdn2", {}),
  slow("rwkv7", {}),
  slow("momentum_deltanet", {}),
  ("titans", {"form": "retnet", "expand_v": 1.0}),
  slow("titans", {"form": "mamba2", "expand_v": 1.0}),
  slow("linear", {"form": "mlstm"}),
]
EVERY_LAYER = pytest.mark.parametrize(("rule", "options"), LAYERS)


def tiny(rule, options, **model):
  options = {"chunk": 2, "segment_length": 4, "expansion": 2} | options
  sizes = {"vocab_size": 16, "layers": 1, "d_model": 16, "heads": 2, "mlp_dim": 16, "conv_width": 3, "max_length": 16}
  return ModelConfig(**(sizes | model), memory=MemoryConfig(rule=rule, **options))


def make(config, **changes):
  """The layer, without the model's check of dtype names: these tests run in float64."""
  assert config.problems() == []
  return MemoryCaching(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))


def tokens(config, batch=2, length=LENGTH):
  return np.random.default_rng(0).normal(size=(batch, length, config.d_model))


@EVERY_LAYER
@pytest.mark.usefixtures("float64")
def test_a_layer_decodes_keeps_documents_apart_and_learns_everything(rule, options):
  config = tiny(rule, options)
  graph, params = nnx.split(make(config, dtype="float64"))
  x, cache_config = tokens(config), CacheConfig(LENGTH)
  document = np.array([[1] * 4 + [2] * 6, [1] * 7 + [2] * 2 + [0]])

  def steps(params):
    layer, context = nnx.merge(graph, params), Context(cache=cache_config)
    prompt, cache = layer(x[:, :PROMPT], dataclasses.replace(context, lengths=jnp.array([PROMPT, 3])))

    def step(cache, token):
      y, cache = layer(token[:, None], context, cache)
      return cache, y[:, 0]

    rows = jnp.arange(2)[:, None]
    _, after = jax.lax.scan(step, cache, jnp.moveaxis(x[rows, jnp.array([[PROMPT], [3]]) + jnp.arange(5)], 1, 0))
    _, empty = jax.lax.scan(step, layer.init_cache(cache_config, 2), jnp.moveaxis(x[:, :2], 1, 0))
    return prompt, jnp.moveaxis(after, 0, 1), jnp.moveaxis(empty, 0, 1)

  def loss(params):
    layer = nnx.merge(graph, params)
    plain, packed = layer(x)[0], layer(x, Context(document))[0]
    alone = layer(x[:1, 4:])[0]
    return jnp.square(plain).sum(), (plain, packed, alone)

  @jit
  def everything(params):
    gradients, (plain, packed, alone) = jax.grad(loss, has_aux=True)(params)
    return gradients, plain, packed, alone, steps(params)

  gradients, plain, packed, alone, (prompt, after, empty) = everything(params)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)  # norms and gates are float32
  close(prompt[0], plain[0, :PROMPT])
  close(prompt[1, :3], plain[1, :3])
  close(after[0], plain[0, PROMPT:])
  close(after[1], plain[1, 3:8])
  close(empty, plain[:, :2])
  close(packed[0, 4:], alone[0])
  close(packed[1, :7], plain[1, :7])
  for path, gradient in nnx.to_flat_state(gradients):
    assert np.isfinite(gradient[...]).all(), path
    assert np.abs(gradient[...]).max() > 0, path
