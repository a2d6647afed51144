"""What a model keeps of the tokens so far, to go on from them one by one."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.memory import decode, pages
from mc_jax.models.config import ModelConfig
from mc_jax.parallel import axes
from mc_jax.parallel import mesh as meshes
from mc_jax.parallel.mesh import MeshConfig

FULL = ("error", "drop_oldest")

Pytree = Any


@dataclasses.dataclass(frozen=True)
class CacheConfig:
  """What a cache is made for. Static under jit."""

  tokens: int  # of a sequence, prompt and continuation, at most
  capacity: int | None = None  # segments whose states are kept; None: as many as `tokens` make
  full: str = "error"  # when more are to be kept: an error, or drop_oldest
  dtype: str | None = None  # of cached states: float32, bfloat16, int8; None: the model's, which changes no number
  memory: str = "device"  # of cached states: device; host, with memory.aggregation="ssc", whose steps fetch few

  def segments(self, model: ModelConfig) -> int:
    """Segments whose states a layer can keep."""
    length = model.memory.as_read().segment_length
    return decode.capacity_for(length, self.tokens) if self.capacity is None else self.capacity

  def problems(self, model: ModelConfig, prefix: str = "cache") -> list[str]:
    """Everything that cannot be, each line naming the field and the valid values."""
    found = []
    if self.full not in FULL:
      found.append(f"{prefix}.full={self.full!r} is not one of {', '.join(FULL)}")
    if self.dtype not in (None, *decode.CACHE_DTYPES):
      found.append(f"{prefix}.dtype={self.dtype!r} is not one of {', '.join(decode.CACHE_DTYPES)}")
    memory = model.memory.as_read()
    if self.memory not in decode.MEMORIES:
      found.append(f"{prefix}.memory={self.memory!r} is not one of {', '.join(decode.MEMORIES)}")
    elif self.memory == "host" and (model.mixer != "memory_caching" or memory.aggregation != "ssc"):
      found.append(
        f"{prefix}.memory='host' needs model.mixer='memory_caching' and model.memory.aggregation='ssc', whose steps "
        f"read few states; model.mixer={model.mixer!r} with model.memory.aggregation={memory.aggregation!r} reads all "
        f"that is cached for every token: use {prefix}.memory='device'"
      )
    if self.tokens < 1:
      found.append(f"{prefix}.tokens={self.tokens} must be at least 1")
    if self.capacity is not None and self.capacity < 1:
      found.append(f"{prefix}.capacity={self.capacity} must be at least 1 segment")
    if model.mixer == "memory_caching" and memory.segmentation != "constant":
      found.append(
        f"model.memory.segmentation={memory.segmentation!r} cannot be decoded: where segments are cut depends on the "
        "length of the sequence; use segmentation='constant'"
      )
    elif memory.gate == "token" and not found and decode.capacity_for(memory.segment_length, self.tokens) > model.ages:
      found.append(
        f"{prefix}.tokens={self.tokens:,} make more segments than model.max_length={model.max_length}, which "
        "model.memory.gate='token' has scores for"
      )
    elif not found and self.full == "error" and model.mixer == "memory_caching" and memory.aggregation != "none":
      try:
        decode.require_room(memory.segment_length, self.segments(model), self.tokens)
      except decode.CacheFull as error:
        found.append(f"{prefix}.capacity={self.capacity} is too small: {error}, or {prefix}.full='drop_oldest'")
    return found


class LayerCache(NamedTuple):
  """One layer's cache.

  Attributes:
    slots: what grows with the sequence, leaves [slots, batch, ...]: cached memories, or keys and values.
    first: int32, the layer's first slot in `slots`.
    own: everything else, of a size that does not depend on the sequence.
  """

  slots: Pytree
  first: jax.Array
  own: Pytree


class Cache(NamedTuple):
  """All layers' caches.

  The layers' slots lie in one array, which the loop over layers carries along and writes in place: were it cut up and
  put together again, every token would cost a copy of the whole cache.

  Attributes:
    position: [batch] int32, tokens so far.
    layers: a LayerCache; leaves of slots are [layers * slots, batch, ...], of the rest [layers, ...].
  """

  position: jax.Array
  layers: LayerCache


def stack(position: jax.Array, layers: LayerCache) -> Cache:
  """The cache of layers whose leaves, those of slots too, are stacked on a leading axis."""
  count = len(layers.first)
  first = jnp.arange(count, dtype=jnp.int32) * jax.tree.leaves(layers.slots)[0].shape[1]
  slots = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), layers.slots)
  return Cache(position, LayerCache(slots, first, layers.own))


def repeat(cache: Cache, times: int) -> Cache:
  """A cache whose rows are each repeated so many times."""
  layers = cache.layers

  def rows(x):
    if isinstance(x, decode.Paged):
      return decode.Paged(pages.repeat(x.pages, times), jax.tree.map(rows, x.scale))
    return jnp.repeat(x, times, axis=1)

  slots, own = jax.tree.map(rows, (layers.slots, layers.own), is_leaf=lambda x: isinstance(x, decode.Paged))
  return Cache(jnp.repeat(cache.position, times), LayerCache(slots, layers.first, own))


def placed(tree: Pytree, mesh: jax.sharding.Mesh | None) -> Pytree:
  """Abstract arrays, caches among them, with the places where they go: what restores a saved cache.

  Slots are split as steps split them, pages in host memory: were they whole on every device first, a cache that fills a
  mesh could not be read. The rest, small, is whole until the first step moves it.
  """
  # A mesh of one device and not a SingleDeviceSharding, with which jax 0.10 makes arrays from files that lie in host
  # memory and are not of that type.
  mesh = meshes.make(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh

  def at(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  def whole(x):
    return at(x, axes.sharding(mesh, ()))

  def split(x):
    return axes.sharding(mesh, (None, "batch", "heads"), x.shape)

  def of_slots(x):
    if isinstance(x, decode.Paged):
      pages = at(x.pages, split(x.pages).with_memory_kind("pinned_host"))
      return decode.Paged(pages, jax.tree.map(of_slots, x.scale))
    return at(x, split(x))

  def place(x):
    if not isinstance(x, Cache):
      return whole(x)
    slots = jax.tree.map(of_slots, x.layers.slots, is_leaf=lambda x: isinstance(x, decode.Paged))
    rest = jax.tree.map(whole, x._replace(layers=x.layers._replace(slots=None)))
    return rest._replace(layers=rest.layers._replace(slots=slots))

  return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, Cache))


def nbytes(tree: Pytree) -> int:
  """Bytes of a tree's arrays, real or abstract."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
