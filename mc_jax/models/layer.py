"""What a layer is, and the table of all layers by name.

A layer is a file: its module, and class methods that answer what the rest of the package asks before there is a model.
Nobody outside that file compares its name. A new layer is a class that is registered, in this package or another:

    @layer.register("ema")
    class MovingAverage(layer.Mixer): ...

after which model.pattern=ema,attention names it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
from flax import nnx

if TYPE_CHECKING:  # these modules import this one
  from mc_jax.models.cache import CacheConfig, LayerCache
  from mc_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Context:
  """What all layers of a call are given besides the tokens.

  Attributes:
    document: [batch, length] int32, number of each token's document, 0 at padding; None: a row is one document.
    cache: What caches are made for; None: no cache is kept.
    lengths: [batch] int32, tokens of each prompt, what follows them is padding; None: all of them.
    active: [batch] bool, in steps the rows that have a token, the others' caches stay; None: all.
    observe: Makes of a layer's memories what the layer returns in place of a cache; None: nobody looks.
    shared: What layers share, {layer's name: the module that its `shared` made}.
  """

  document: jax.Array | None = None
  cache: CacheConfig | None = None
  lengths: jax.Array | None = None
  active: jax.Array | None = None
  observe: Callable[[Any], Any] | None = None
  shared: Mapping[str, nnx.Module] = dataclasses.field(default_factory=dict)


KEPT = "kept"  # `checkpoint_name` of what is kept for the backward pass whatever model.remat says

PLAIN = Context()  # a forward pass over rows of one document each


class Work(NamedTuple):
  """Roughly what a layer does in a training step: enough to order meshes by.

  Attributes:
    parameters: Numbers that every token is multiplied by.
    flops: Of a token, besides those of the parameters.
    chained_flops: The same, where devices that share a sequence wait for each other.
    gathers: Times that as many bytes as a residual stream has are gathered over mesh.context.
  """

  parameters: int = 0
  flops: float = 0.0
  chained_flops: float = 0.0
  gathers: int = 0


class Layer(nnx.Module):
  """One branch of a block, made as kind(config, rngs=rngs) of the whole model's config.

  Class methods answer for all layers of the kind in a model of that config; here they are what suits a layer that
  treats tokens one by one and needs nothing of its own.
  """

  name: ClassVar[str]  # set by `register`

  @classmethod
  def problems(cls, config: ModelConfig, prefix: str) -> list[str]:
    """What is wrong with the model's fields for this layer; `prefix` is "model"."""
    return []

  @classmethod
  def data_problems(cls, config: ModelConfig, length: int, documents: bool) -> list[str]:
    """Why rows of `length` tokens, of several documents or not, cannot be trained on."""
    return []

  @classmethod
  def mesh_problems(cls, config: ModelConfig, length: int, sizes: dict[str, int]) -> list[str]:
    """What a mesh of these sizes, {axis: size}, does not divide, in rows of `length` tokens."""
    return []

  @classmethod
  def work(cls, config: ModelConfig, length: int, context: int) -> Work:
    """What a layer does in rows of `length` tokens that `context` devices share."""
    return Work()

  @classmethod
  def shared(cls, config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module | None:
    """What all layers of the kind share: the model owns it, layers find it in `Context.shared`."""
    return None


class Mixer(Layer):
  """The branch that mixes tokens: an entry of model.pattern."""

  has_memories: ClassVar[bool] = False  # `Context.observe` is shown memories, and model.memory is read
  endless: ClassVar[bool] = False  # with full="drop_oldest" sequences may be longer than CacheConfig.tokens
  host_cache: ClassVar[str | None] = None  # settings with which cached states may be in host memory, for messages

  def __call__(self, x: jax.Array, context: Context = PLAIN, cache: LayerCache | None = None) -> tuple[jax.Array, Any]:
    """A forward pass, a prefill or a step.

    Args:
      x: [batch, length, d_model], in the computation's dtype.
      context: Of the call. With `context.cache` a cache is made of the prompts x, or moved on.
      cache: Of the tokens so far, and x is the next one [batch, 1, d_model]; None: x is the beginning.

    Returns:
      y, of x's shape, and what is left: the LayerCache, what `context.observe` made, or None.
    """
    raise NotImplementedError

  def init_cache(self, config: CacheConfig, batch: int) -> LayerCache:
    """The cache of sequences that have no token yet."""
    raise NotImplementedError

  @classmethod
  def label(cls, config: ModelConfig) -> str:
    """What the layer is, in a word or two for logs."""
    return cls.name

  @classmethod
  def learns_densely(cls, config: ModelConfig) -> bool:
    """Whether training does well to begin with model.memory.dense."""
    return False

  @classmethod
  def cache_problems(cls, config: ModelConfig, cache: CacheConfig, prefix: str) -> list[str]:
    """Why there cannot be such a cache; `prefix` is "cache"."""
    if cls.init_cache is Mixer.init_cache:
      return [f"model.pattern has {cls.name!r}, which cannot be decoded: the layer has no init_cache"]
    return []

  @classmethod
  def pages(cls, config: ModelConfig) -> bool:
    """Whether cached states may be in host memory, see `host_cache`."""
    return False

  @classmethod
  def cache_bytes(cls, config: ModelConfig, length: int) -> dict[str, float]:
    """Bytes of one layer's cache of a sequence; the names are those of planning's `cache_bytes`."""
    return {}

  @classmethod
  def segment_bytes(cls, config: ModelConfig, length: int) -> float:
    """Bytes of the states that a layer keeps of a row in training, for it to be read."""
    return 0.0


class FeedForward(Layer):
  """The branch within tokens: an entry of model.feed_forward."""

  def __call__(self, x: jax.Array, context: Context = PLAIN) -> jax.Array:
    """x [batch, length, d_model] to the same shape, in the computation's dtype."""
    raise NotImplementedError


LAYERS: dict[str, type[Layer]] = {}


def register(name: str) -> Callable[[type[Layer]], type[Layer]]:
  """A class decorator: model.pattern, of a Mixer, or model.feed_forward can name the layer from now on.

  Raises:
    ValueError: The name is taken, or cannot be in a flag's list.
  """
  if not re.fullmatch(r"\w+", name):
    raise ValueError(f"a layer's name must be letters, digits and underscores, got {name!r}")
  if name in LAYERS:
    raise ValueError(f"there is a layer {name!r} already: {LAYERS[name].__qualname__}")

  def add(kind: type[Layer]) -> type[Layer]:
    kind.name = name
    LAYERS[name] = kind
    return kind

  return add


def names(kind: type[Layer]) -> list[str]:
  """The names of all layers that are Mixers, or FeedForwards."""
  return [name for name, known in LAYERS.items() if issubclass(known, kind)]
