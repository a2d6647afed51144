"""The baseline mixer: causal softmax attention with rotary positions."""

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax.models.cache import CacheConfig, LayerCache
from mc_jax.models.config import ModelConfig
from mc_jax.models.linear import Linear, residual_scale
from mc_jax.parallel import axes
from mc_jax.parallel.attention import attention

# Tokens whose keys a step reads at a time.
_TILE = 1024
_SLOTS = (None, "batch", "heads", None, None)


class Attention(nnx.Module):
  """Causal multi-head attention; a token attends to its own document only."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    embed = {"embed": config.d_model}
    heads = {"heads": config.heads, "head_dim": config.head_dim}
    self.rope_theta = config.rope_theta
    self.query = Linear(embed, heads, dtype=config.dtype, rngs=rngs)
    self.key = Linear(embed, heads, dtype=config.dtype, rngs=rngs)
    self.value = Linear(embed, heads, dtype=config.dtype, rngs=rngs)
    self.output = Linear(heads, embed, dtype=config.dtype, scale=residual_scale(config.layers), rngs=rngs)

  def __call__(self, x: jax.Array, document: jax.Array | None = None) -> jax.Array:
    """x [batch, length, d_model] to the same shape, in the computation's dtype.

    Args:
      document: [batch, length] int32, number of each token's document; None: a row is one.
    """
    position = jnp.arange(x.shape[1])[None] if document is None else positions(document)
    y = attention(
      rotate(self.query(x), position, self.rope_theta),
      rotate(self.key(x), position, self.rope_theta),
      self.value(x),
      document,
    )
    return self.output(y)

  def init_cache(self, config: CacheConfig, batch: int) -> LayerCache:
    """The cache of sequences that have no token yet."""
    heads, head_dim = self.key.kernel.shape[1:]
    shape = 1, batch, heads, config.tokens, head_dim
    slots = {name: axes.constrain(jnp.zeros(shape, self.key.dtype), _SLOTS) for name in ("key", "value")}
    return LayerCache(slots, jnp.zeros((), jnp.int32), jnp.zeros(batch, jnp.int32))

  def prefill(self, x: jax.Array, lengths: jax.Array | None, config: CacheConfig) -> tuple[jax.Array, LayerCache]:
    """A call on whole prompts x [batch, length, d_model] of `lengths` [batch] tokens, and the cache after them."""
    batch, length = x.shape[:2]
    position = jnp.arange(length)[None]
    key, value = rotate(self.key(x), position, self.rope_theta), self.value(x)
    y = attention(rotate(self.query(x), position, self.rope_theta), key, value)
    room = [(0, 0), (0, 0), (0, max(config.tokens - length, 0)), (0, 0)]  # what padding brings is overwritten
    slots = {
      name: jnp.pad(jnp.moveaxis(x, 2, 1)[:, :, : config.tokens], room)[None]
      for name, x in {"key": key, "value": value}.items()
    }
    lengths = jnp.full(batch, length, jnp.int32) if lengths is None else lengths
    return self.output(y), LayerCache(slots, jnp.zeros((), jnp.int32), lengths)

  def step(
    self, x: jax.Array, cache: LayerCache, active: jax.Array | None, config: CacheConfig
  ) -> tuple[jax.Array, LayerCache]:
    """A call on the next token x [batch, 1, d_model] of the sequences that are active [batch] (None: all are)."""
    position, rows = cache.own, jnp.arange(len(x))[:, None]
    turn = position[:, None]
    new = {"key": rotate(self.key(x), turn, self.rope_theta), "value": self.value(x)}
    place = position if active is None else jnp.where(active, position, config.tokens)
    # Head by head: a scatter of all heads at once would have XLA:TPU copy the whole cache into another layout.
    heads = jnp.arange(self.key.kernel.shape[1])
    slots = {
      name: slot.at[cache.first, rows, heads, place[:, None]].set(new[name][:, 0], mode="drop")
      for name, slot in cache.slots.items()
    }
    query = rotate(self.query(x), turn, self.rope_theta)[:, 0] * self.key.kernel.shape[-1] ** -0.5
    y = _attend(query, slots["key"], slots["value"], cache.first, turn)[:, None].astype(x.dtype)
    position += 1 if active is None else active
    return self.output(y), LayerCache(slots, cache.first, position)


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


def positions(document: jax.Array) -> jax.Array:
  """Position of each token in its document: 0, 1, ... restarting where the number changes.

  Args:
    document: [batch, length] int32, number of each token's document.

  Returns:
    [batch, length] int32.
  """
  index = jnp.broadcast_to(jnp.arange(document.shape[1], dtype=jnp.int32), document.shape)
  previous = jnp.pad(document, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  start = jax.lax.cummax(jnp.where(document != previous, index, 0), axis=1)
  return index - start


def rotate(x: jax.Array, position: jax.Array, theta: float) -> jax.Array:
  """Rotary position embedding (arXiv:2104.09864): turns pairs of x's last axis by angles.

  Pair i of head_dim / 2 turns by position * theta^(-2 i / head_dim); computed in float32.

  Args:
    x: [batch, length, heads, head_dim], head_dim even.
    position: [batch or 1, length] int.
    theta: base of the angles.

  Returns:
    x's shape and dtype.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = position[..., None, None].astype(jnp.float32) * frequency
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
