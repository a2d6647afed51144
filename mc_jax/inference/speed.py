"""How fast a model decodes at a context: compiled steps on a cache that is as if so many tokens had been read.

How long a step takes depends on how many states are cached, not on the numbers in them. So nothing is prefilled: the
slots hold noise, and the position is set. Only what ssc chooses depends on the numbers; as states that differ, and
tokens that differ, make it choose others at every step, none is in a processor's cache because the last step read it.
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

LONGEST = 256  # steps of a timed loop, at most
WARM = 2  # steps before the first


@dataclasses.dataclass(frozen=True)
class Steps:
  """A loop over steps, compiled; a sequence is full (decoder.cache.tokens) after the last of them.

  Attributes:
    decoder: the model, and what its caches are made for.
    batch: sequences.
    cache: shapes, dtypes and shardings.
    fill: params, position to a cache.
    loop: params, cache, tokens [LONGEST, batch], count to (cache, the tokens that are likeliest after the last).
  """

  decoder: Decoder
  batch: int
  cache: Cache
  fill: jax.stages.Compiled
  loop: jax.stages.Compiled

  @property
  def slot_bytes(self) -> int:
    """Of what grows with the context: cached states and their summaries, or keys and values; all sequences."""
    return cache_lib.nbytes(self.cache.slots)

  @property
  def other_bytes(self) -> int:
    """Of the rest of the cache: what the memories carry, the convolutions' last tokens, positions."""
    return cache_lib.nbytes(self.cache) - self.slot_bytes

  @property
  def temporary_bytes(self) -> int:
    """What the loop allocates beside its arguments: were the cache not written in place, at least the cache's bytes."""
    memory = self.loop.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

  def seconds(self, count: int, repeats: int = 1) -> list[tuple[float, float]]:
    """Of one step, timed `repeats` times over `count` of them, the last of which ends the context.

    Returns:
      Seconds, and those in which this process's threads computed: on a busy machine the second are the steadier.
    """
    decoder = self.decoder
    shape = LONGEST, self.batch
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, decoder.config.vocab_size, shape, np.int32))
    cache = self.fill(decoder.params, jnp.int32(decoder.cache.tokens - count * repeats - WARM))
    cache, _ = jax.block_until_ready(self.loop(decoder.params, cache, tokens, jnp.int32(WARM)))
    found = []
    for _ in range(repeats):
      begin, cpu = time.perf_counter(), time.process_time()
      cache, _ = jax.block_until_ready(self.loop(decoder.params, cache, tokens, jnp.int32(count)))
      found.append(((time.perf_counter() - begin) / count, (time.process_time() - cpu) / count))
    return found


def cache_bytes(decoder: Decoder, batch: int) -> int:
  """Of a whole cache; nothing is compiled."""

  def init(params):
    return nnx.merge(decoder.graph, params).init_cache(decoder.cache, batch)

  with jax.set_mesh(decoder.mesh):
    return cache_lib.nbytes(jax.eval_shape(init, decoder.params))


def compile_steps(decoder: Decoder, batch: int) -> Steps:
  """Compiles steps for the devices that the decoder's parameters are on."""
  with jax.set_mesh(decoder.mesh):
    fill, cache = _compile_fill(decoder, batch)
    tokens, count = jax.ShapeDtypeStruct((LONGEST, batch), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    loop = _loop.lower(decoder.graph, decoder.params, cache, tokens, count, decoder.cache).compile()
  return Steps(decoder, batch, cache, fill, loop)


def compile_step(decoder: Decoder, batch: int) -> tuple[jax.stages.Compiled, Cache]:
  """One step for devices that need not be there, and the abstract cache; the decoder's parameters are abstract too."""
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

  def at_position(x):  # the only integers of a layer's own are positions
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
    # Each step waits for the one before it, as in generation; what it reads is random nevertheless.
    token = (likeliest + tokens[i]) % model.config.vocab_size
    logits, cache = model.step(token, cache, config)
    return cache, logits.argmax(-1).astype(jnp.int32)

  return jax.lax.fori_loop(0, count, body, (cache, tokens[0]))


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _step(graph, params, cache, tokens, config):
  logits, cache = nnx.merge(graph, params).step(tokens, cache, config)
  return logits.argmax(-1), cache


def _noise(x: jax.Array) -> jax.Array:
  """x plus numbers up to 1/8, integers up to 127: hashes of their places, which take no longer than writing them."""
  n = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape) * np.uint32(2654435769)
  n = (n ^ n >> 15) * np.uint32(739982445)
  n = jax.lax.bitcast_convert_type(n ^ n >> 12, jnp.int32)
  return x + (n >> 24 if jnp.issubdtype(x.dtype, jnp.integer) else n * np.float32(2**-34)).astype(x.dtype)
