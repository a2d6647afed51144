"""What a model keeps of the tokens so far, to go on from them one by one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.memory import decode, pages
from mc_jax.models import layer
from mc_jax.parallel import axes
from mc_jax.parallel import mesh as meshes
from mc_jax.parallel.mesh import MeshConfig

if TYPE_CHECKING:
  from mc_jax.models.config import ModelConfig

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

  def problems(self, model: ModelConfig, prefix: str = "cache") -> list[str]:
    """Everything that cannot be, each line naming the field and the valid values."""
    found = []
    if self.full not in FULL:
      found.append(f"{prefix}.full={self.full!r} is not one of {', '.join(FULL)}")
    if self.dtype not in (None, *decode.CACHE_DTYPES):
      found.append(f"{prefix}.dtype={self.dtype!r} is not one of {', '.join(decode.CACHE_DTYPES)}")
    if self.memory not in decode.MEMORIES:
      found.append(f"{prefix}.memory={self.memory!r} is not one of {', '.join(decode.MEMORIES)}")
    elif self.memory == "host" and not any(kind.pages(model) for kind in model.mixers):
      able = [kind for kind in layer.LAYERS.values() if issubclass(kind, layer.Mixer) and kind.host_cache]
      needed = " or ".join(f"model.pattern with {kind.name} and {kind.host_cache}" for kind in able)
      found.append(
        f"{prefix}.memory='host' needs a layer whose steps read few states, {needed}; a model of {model.label} reads "
        f"all that is cached for every token: use {prefix}.memory='device'"
      )
    sizes = []
    if self.tokens < 1:
      sizes.append(f"{prefix}.tokens={self.tokens} must be at least 1")
    if self.capacity is not None and self.capacity < 1:
      sizes.append(f"{prefix}.capacity={self.capacity} must be at least 1 segment")
    kinds = () if sizes else dict.fromkeys(model.mixers)
    return [*found, *sizes, *(line for kind in kinds for line in kind.cache_problems(model, self, prefix))]


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

  The slots of layers that are alike lie in one array, which the loop over layers carries along and writes in place:
  were it cut up and put together again, every token would cost a copy of the whole cache.

  Attributes:
    position: [batch] int32, tokens so far.
    layers: a LayerCache for each place in the model's period, of the layers there; leaves of slots are
      [repeats * slots, batch, ...], of the rest [repeats, ...].
  """

  position: jax.Array
  layers: tuple[LayerCache, ...]

  @property
  def slots(self) -> tuple[Pytree, ...]:
    """What grows with the sequences."""
    return tuple(layer.slots for layer in self.layers)


def stack(layers: LayerCache) -> LayerCache:
  """Caches of layers that are alike, all leaves stacked on a leading axis, with their slots joined."""
  slots = jax.tree.leaves(layers.slots)
  count, each = len(layers.first), slots[0].shape[1] if slots else 0
  joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), layers.slots)
  return LayerCache(joined, jnp.arange(count, dtype=jnp.int32) * each, layers.own)


def repeat(cache: Cache, times: int) -> Cache:
  """A cache whose rows are each repeated so many times."""

  def rows(x):
    if isinstance(x, decode.Paged):
      return decode.Paged(pages.repeat(x.pages, times), jax.tree.map(rows, x.scale))
    return jnp.repeat(x, times, axis=1)

  def of_layers(layers):
    slots, own = jax.tree.map(rows, (layers.slots, layers.own), is_leaf=lambda x: isinstance(x, decode.Paged))
    return LayerCache(slots, layers.first, own)

  return Cache(jnp.repeat(cache.position, times), tuple(map(of_layers, cache.layers)))


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
    if not isinstance(x, LayerCache):
      return whole(x)
    slots = jax.tree.map(of_slots, x.slots, is_leaf=lambda x: isinstance(x, decode.Paged))
    return LayerCache(slots, whole(x.first), jax.tree.map(whole, x.own))

  return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, LayerCache))


def nbytes(tree: Pytree) -> int:
  """Bytes of a tree's arrays, real or abstract."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
