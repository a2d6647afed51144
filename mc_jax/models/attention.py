"""The attention layer, of the Transformer baseline: causal softmax attention with rotary positions."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax.models import layer, problems
from mc_jax.models.cache import CacheConfig, LayerCache
from mc_jax.models.layer import PLAIN, Context, Work
from mc_jax.models.linear import Linear, residual_scale
from mc_jax.models.rotary import positions, rotate
from mc_jax.parallel import axes
from mc_jax.parallel.attention import attention

if TYPE_CHECKING:
  from mc_jax.models.config import ModelConfig

# Tokens whose keys a step reads at a time.
_TILE = 1024
_SLOTS = (None, "batch", "heads", None, None)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """What can be turned in attention layers."""

  rope_theta: float = 10000.0  # base of the rotary position embedding

  def problems(self, prefix: str = "attention") -> list[str]:
    """Everything wrong with these values, each line naming the field and the valid values."""
    return list(problems.positive(prefix, self, "rope_theta"))


@layer.register("attention")
class Attention(layer.Mixer):
  """Causal multi-head attention; a token attends to its own document only."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    embed = {"embed": config.d_model}
    heads = {"heads": config.heads, "head_dim": config.head_dim}
    self.rope_theta = config.attention.rope_theta
    self.query = Linear(embed, heads, dtype=config.dtype, rngs=rngs)
    self.key = Linear(embed, heads, dtype=config.dtype, rngs=rngs)
    self.value = Linear(embed, heads, dtype=config.dtype, rngs=rngs)
    self.output = Linear(heads, embed, dtype=config.dtype, scale=residual_scale(config.layers), rngs=rngs)

  def __call__(
    self, x: jax.Array, context: Context = PLAIN, cache: LayerCache | None = None
  ) -> tuple[jax.Array, LayerCache | None]:
    """See `layer.Mixer`."""
    if cache is not None:
      position = cache.own[:, None]
    elif context.document is not None:
      position = positions(context.document)
    else:
      position = jnp.arange(x.shape[1])[None]
    query, key = (rotate(project(x), position, self.rope_theta) for project in (self.query, self.key))
    value = self.value(x)
    if cache is not None:
      y, cache = self._step(query, key, value, cache, context)
    else:
      y = attention(query, key, value, context.document)
      cache = None if context.cache is None else self._filled(key, value, context)
    return self.output(y), cache

  def init_cache(self, config: CacheConfig, batch: int) -> LayerCache:
    """The cache of sequences that have no token yet."""
    heads, head_dim = self.key.kernel.shape[1:]
    shape = 1, batch, heads, config.tokens, head_dim
    slots = {name: axes.constrain(jnp.zeros(shape, self.key.dtype), _SLOTS) for name in ("key", "value")}
    return LayerCache(slots, jnp.zeros((), jnp.int32), jnp.zeros(batch, jnp.int32))

  def _filled(self, key: jax.Array, value: jax.Array, context: Context) -> LayerCache:
    """The cache after prompts that have these keys and values [batch, length, heads, head_dim]."""
    (batch, length), tokens = key.shape[:2], context.cache.tokens
    room = [(0, 0), (0, 0), (0, max(tokens - length, 0)), (0, 0)]  # what padding brings is overwritten

    def slot(x):
      return jnp.pad(jnp.moveaxis(x, 2, 1)[:, :, :tokens], room)[None]

    lengths = jnp.full(batch, length, jnp.int32) if context.lengths is None else context.lengths
    return LayerCache({"key": slot(key), "value": slot(value)}, jnp.zeros((), jnp.int32), lengths)

  def _step(
    self, query: jax.Array, key: jax.Array, value: jax.Array, cache: LayerCache, context: Context
  ) -> tuple[jax.Array, LayerCache]:
    """Attention of the next token's query [batch, 1, heads, head_dim], and the cache with its key and value."""
    position, active, rows = cache.own, context.active, jnp.arange(len(query))[:, None]
    place = position if active is None else jnp.where(active, position, context.cache.tokens)
    # Head by head: a scatter of all heads at once would have XLA:TPU copy the whole cache into another layout.
    heads, new = jnp.arange(query.shape[2]), {"key": key, "value": value}
    slots = {
      name: slot.at[cache.first, rows, heads, place[:, None]].set(new[name][:, 0], mode="drop")
      for name, slot in cache.slots.items()
    }
    scaled = query[:, 0] * query.shape[-1] ** -0.5
    y = _attend(scaled, slots["key"], slots["value"], cache.first, position[:, None])[:, None].astype(query.dtype)
    position += 1 if active is None else active
    return y, LayerCache(slots, cache.first, position)

  @classmethod
  def problems(cls, config: ModelConfig, prefix: str) -> list[str]:
    """Rotary positions turn pairs."""
    if config.head_dim % 2 == 0:
      return []
    return [
      f"{prefix}.d_model / {prefix}.heads = {config.head_dim} is odd: rotary positions "
      f"({prefix}.pattern with {cls.name}) turn pairs, so d_model must be a multiple of 2 heads"
    ]

  @classmethod
  def mesh_problems(cls, config: ModelConfig, length: int, sizes: dict[str, int]) -> list[str]:
    """Heads are split, and queries with mesh.context."""
    return [
      *problems.indivisible(config.heads, f"model.heads={config.heads}", sizes, "model"),
      *problems.indivisible(length, f"data.length={length}", sizes, "context"),
    ]

  @classmethod
  def work(cls, config: ModelConfig, length: int, context: int) -> Work:
    """Scores of all earlier tokens, on the device that has the most to do.

    Keys and values are gathered, forward and twice backward, and scattered.
    """
    flops = 16 * config.d_model * length / 2 * (2 - 1 / context)
    return Work(parameters=6 * config.d_model**2, flops=flops, gathers=8)

  @classmethod
  def cache_bytes(cls, config: ModelConfig, length: int) -> dict[str, float]:
    """Keys and values, in the computation's dtype."""
    return {"sequence": 2 * length * config.d_model * jnp.dtype(config.dtype).itemsize}


def _attend(query: jax.Array, keys: jax.Array, values: jax.Array, layer: jax.Array, last: jax.Array) -> jax.Array:
  """Softmax attention of one query a row to the tokens up to its own, tile by tile.

  A layer's keys are never cut out of the cache as a whole: XLA:CPU would copy them for every token.

  Args:
    query: [batch, heads, head_dim], scaled.
    keys, values: of all layers, [layers, batch, heads, tokens, head_dim].
    layer: int32.
    last: [batch, 1] int32, place of the query's own token.

  Returns:
    [batch, heads, head_dim] float32.
  """
  tokens = keys.shape[3]
  tile = min(_TILE, tokens)

  def read(so_far, i):
    largest, total, y = so_far
    start = jnp.minimum(i * tile, tokens - tile)  # the last tile may lie over the one before
    key, value = (_cut(x, layer, start, tile) for x in (keys, values))
    place = start + jnp.arange(tile)
    scores = jnp.einsum("bhd,bhtd->bht", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(((place >= i * tile) & (place <= last))[:, None], scores, -jnp.inf)
    new = jnp.maximum(largest, scores.max(-1))  # finite from the first tile on: every query sees token 0
    weights, kept = jnp.exp(scores - new[..., None]), jnp.exp(largest - new)
    y *= kept[..., None]
    y += jnp.einsum("bht,bhtd->bhd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (new, kept * total + weights.sum(-1), y), None

  none = jnp.full(query.shape[:2], -jnp.inf, jnp.float32)
  start = none, jnp.zeros_like(none), jnp.zeros(query.shape, jnp.float32)
  (_, total, y), _ = jax.lax.scan(read, start, jnp.arange(-(-tokens // tile)))
  return y / total[..., None]


def _cut(x: jax.Array, layer: jax.Array, start: jax.Array, tile: int) -> jax.Array:
  """x[layer, :, :, start : start + tile], by one slice."""
  size = 1, *x.shape[1:3], tile, x.shape[4]
  return jax.lax.dynamic_slice(x, (layer, 0, 0, start, 0), size)[0]
