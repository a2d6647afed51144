"""Times decoding at a context, with compiled steps on a cache as it would be after that many tokens.

The time of a step depends on the number of cached states, not on their values. So nothing is prefilled: the slots hold
noise, and the position is set. Only the choices of ssc depend on values; because states and tokens differ, they change
at every step, so that no state is still in a processor's cache from the step before.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_jax.inference.generation import Decoder
from mc_jax.models import Cache
from mc_jax.models import cache as cache_lib

LONGEST = 256  # most steps in a timed loop
WARM = 2  # steps before the first timed loop


@dataclasses.dataclass(frozen=True)
class Steps:
  """A compiled loop over steps; after the last of them a sequence has decoder.cache.tokens tokens.

  Attributes:
    decoder: The model and its cache's configuration.
    batch: The number of sequences.
    cache: Shapes, dtypes and shardings of the cache.
    fill: (params, position) -> cache.
    loop: (params, cache, tokens [LONGEST, batch], count) -> (cache, the likeliest tokens after the last step).
  """

  decoder: Decoder
  batch: int
  cache: Cache
  fill: jax.stages.Compiled
  loop: jax.stages.Compiled

  @property
  def slot_bytes(self) -> int:
    """Bytes that grow with the context: cached states and summaries, or keys and values, of all sequences."""
    return cache_lib.nbytes(self.cache.slots)

  @property
  def other_bytes(self) -> int:
    """Bytes of the rest of the cache: online states, the convolutions' last tokens, positions."""
    return cache_lib.nbytes(self.cache) - self.slot_bytes

  @property
  def temporary_bytes(self) -> int:
    """Bytes that the loop allocates beside its arguments: less than the cache's if it is updated in place."""
    memory = self.loop.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

  def seconds(self, count: int, repeats: int = 1) -> list[tuple[float, float]]:
    """Times `repeats` loops of `count` steps each, the last of which end at the context's end.

    Returns:
      (seconds, CPU seconds of this process's threads) of one step, for each loop. CPU seconds are steadier on a busy
      machine.
    """
    decoder = self.decoder
    shape = LONGEST, self.batch
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, decoder.config.vocab_size, shape, np.int32))
    cache = self.fill(decoder.params, jnp.int32(decoder.cache.tokens - count * repeats - WARM))
    cache, _ = jax.block_until_ready(self.loop(decoder.params, cache, tokens, jnp.int32(WARM)))
    timings = []
    for _ in range(repeats):
      begin, cpu = time.perf_counter(), time.process_time()
      cache, _ = jax.block_until_ready(self.loop(decoder.params, cache, tokens, jnp.int32(count)))
      timings.append(((time.perf_counter() - begin) / count, (time.process_time() - cpu) / count))
    return timings


def whole_cache_bytes(decoder: Decoder, batch: int) -> int:
  """Bytes of a whole cache. Nothing is compiled."""

  def init(params):
    return nnx.merge(decoder.graph, params).init_cache(decoder.cache, batch)

  with jax.set_mesh(decoder.mesh):
    return cache_lib.nbytes(jax.eval_shape(init, decoder.params))


def compile_steps(decoder: Decoder, batch: int) -> Steps:
  """Compiles steps for the devices of the decoder's parameters."""
  with jax.set_mesh(decoder.mesh):
    fill, cache = _compile_fill(decoder, batch)
    tokens, count = jax.ShapeDtypeStruct((LONGEST, batch), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    loop = _loop.lower(decoder.graph, decoder.params, cache, tokens, count, decoder.cache).compile()
  return Steps(decoder, batch, cache, fill, loop)


def compile_step(decoder: Decoder, batch: int) -> tuple[jax.stages.Compiled, Cache]:
  """Compiles one step from abstract parameters, for devices that need not exist: (step, abstract cache)."""
  with jax.set_mesh(decoder.mesh):
    _, cache = _compile_fill(decoder, batch)
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=cache.position.sharding)
    return _step.lower(decoder.graph, decoder.params, cache, tokens, decoder.cache).compile(), cache


def _compile_fill(decoder: Decoder, batch: int) -> tuple[jax.stages.Compiled, Cache]:
  position = jax.ShapeDtypeStruct((), jnp.int32)
  lowered = _fill.lower(decoder.graph, decoder.params, position, decoder.cache, batch)
  fill = lowered.compile()

  def placed(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return fill, jax.tree.map(placed, lowered.out_info, fill.output_shardings)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _fill(graph, params, position, config, batch):
  cache = nnx.merge(graph, params).init_cache(config, batch)

  def at_position(x):  # a layer's only integers are positions
    return jnp.full_like(x, position) if jnp.issubdtype(x.dtype, jnp.integer) else x

  layers = (
    layers._replace(slots=jax.tree.map(_noise, layers.slots), own=jax.tree.map(at_position, layers.own))
    for layers in cache.layers
  )
  return Cache(at_position(cache.position), tuple(layers))


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def _loop(graph, params, cache, tokens, count, config):
  model = nnx.merge(graph, params)

  def body(i, carry):
    cache, likeliest = carry
    # As in generation, each step depends on the one before it; its token is random nevertheless.
    token = (likeliest + tokens[i]) % model.config.vocab_size
    logits, cache = model.step(token, cache, config)
    return cache, logits.argmax(-1).astype(jnp.int32)

  return jax.lax.fori_loop(0, count, body, (cache, tokens[0]))


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _step(graph, params, cache, tokens, config):
  logits, cache = nnx.merge(graph, params).step(tokens, cache, config)
  return logits.argmax(-1), cache


def _noise(x: jax.Array) -> jax.Array:
  """x plus noise of up to 1/8, or 127 for integers: hashes of the indices, which cost no more than writing them."""
  n = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape) * np.uint32(2654435769)
  n = (n ^ n >> 15) * np.uint32(739982445)
  n = jax.lax.bitcast_convert_type(n ^ n >> 12, jnp.int32)
  return x + (n >> 24 if jnp.issubdtype(x.dtype, jnp.integer) else n * np.float32(2**-34)).astype(x.dtype)
