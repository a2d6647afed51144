"""Decoding with states in host memory, compiled by the TPUs' own compiler for chips that are not there."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mc_jax.models import CacheConfig, LanguageModel, MemoryConfig, ModelConfig
from mc_jax.models import cache as cache_lib
from mc_jax.parallel import mesh as meshes
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.planning import topology

pytest.importorskip("libtpu", reason="holds the TPUs' compiler; wheels for Linux on x86_64 only")

MODEL = ModelConfig(
  vocab_size=256,
  layers=2,
  d_model=128,
  heads=2,
  mlp_dim=128,
  dtype="bfloat16",
  memory=MemoryConfig(rule="linear", aggregation="ssc", segment_length=16, chunk=16),
)
BATCH, CAPACITY = 2, 512
ALONE, FOUR = {}, {"data": 2, "model": 2}


def programs(name, sizes, dtype):
  """(prefill, steps) with their abstract arguments, the mesh, and a chip's bytes of states in host memory."""
  config = CacheConfig(16 * CAPACITY, dtype=dtype, memory="host")
  devices = topology.topology(name).devices
  mesh = meshes.make(MeshConfig(**sizes), devices if sizes else devices[:1])
  graph, params = nnx.split(nnx.eval_shape(lambda: LanguageModel(MODEL, nnx.Rngs(0))))
  params = nnx.to_pure_dict(params)
  with jax.set_mesh(mesh):

    def prefill(params, tokens):
      return nnx.merge(graph, params).prefill(tokens, config)

    def steps(params, tokens, cache):
      def body(_, carry):
        logits, cache = nnx.merge(graph, params).step(*carry, config)
        return logits.argmax(-1).astype(jnp.int32), cache

      return jax.lax.fori_loop(0, 100, body, (tokens, cache))

    cache = jax.eval_shape(lambda params: nnx.merge(graph, params).init_cache(config, BATCH), params)
    tokens = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    prompt = jax.ShapeDtypeStruct((BATCH, 64), jnp.int32)
    params, tokens, prompt, cache = cache_lib.placed((params, tokens, prompt, cache), mesh)
  bytes_ = cache_lib.nbytes(cache.slots[0]["memories"].pages) // mesh.size
  return (prefill, (params, prompt)), (steps, (params, tokens, cache)), mesh, bytes_


def compiled(function, args, mesh, **options):
  with jax.set_mesh(mesh):
    return jax.jit(function, **options).lower(*args).compile()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("chip", "sizes", "dtype"),
  [
    ("v5e:2x2", ALONE, None),
    ("v5p:2x2x1", ALONE, None),
    ("v5e:2x2", ALONE, "int8"),
    ("v5p:2x2x1", FOUR, None),
  ],
  ids=str,
)
def test_steps_leave_the_states_in_host_memory(chip, sizes, dtype):
  """In place, without a copy there or on the device."""
  _, (steps, args), mesh, held = programs(chip, sizes, dtype)
  program = compiled(steps, args, mesh, donate_argnums=2)
  memory = program.memory_analysis()
  assert memory.host_argument_size_in_bytes == held
  assert memory.host_alias_size_in_bytes == held
  assert memory.host_temp_size_in_bytes == 0
  assert memory.temp_size_in_bytes < held
  assert "HostExecute" not in program.as_text()


@pytest.mark.slow
def test_prompts_leave_their_states_in_host_memory():
  (prefill, args), _, mesh, held = programs("v5e:2x2", FOUR, None)
  memory = compiled(prefill, args, mesh).memory_analysis()
  assert memory.host_output_size_in_bytes == held
  assert memory.host_temp_size_in_bytes == 0
  assert memory.output_size_in_bytes < held / 4
