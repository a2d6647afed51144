"""What can be turned in a model: every field, its default and its valid values."""

from __future__ import annotations

import dataclasses
import math

from mc_jax.errors import ConfigError
from mc_jax.memory import aggregate, rules
from mc_jax.models import layer, memory_caching, swiglu  # noqa: F401  (these two register their layers)
from mc_jax.models import problems as lines
from mc_jax.models.attention import AttentionConfig
from mc_jax.models.layer import FeedForward, Layer, Mixer
from mc_jax.models.memory_config import MemoryConfig
from mc_jax.models.product_keys import ProductKeysConfig

DTYPES = ("float32", "bfloat16")
REMATS = ("full", "dots", "none")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A language model: an embedding, `layers` pre-norm residual blocks, a norm and a readout."""

  vocab_size: int = 256  # tokens; 256 for bytes
  layers: int = 4  # blocks, each a mixer and a feed-forward network
  pattern: tuple[str, ...] = ("memory",)  # the blocks' mixers, repeated: memory, attention (memory,memory,attention)
  feed_forward: tuple[str, ...] = ("swiglu",)  # the blocks' feed-forward networks, repeated: swiglu, product_keys
  d_model: int = 256  # width of the residual stream
  heads: int = 4  # memories (or attention heads) per layer, each of d_model / heads
  mlp_dim: int = 0  # hidden width of the SwiGLU; 0: 8/3 d_model, rounded up to a multiple of 64
  conv_width: int = 4  # tokens that the causal convolution on q, k and v sees; 1: itself only
  max_length: int = 4096  # tokens; only memory.gate="token" depends on it, for its number of ages
  dtype: str = "float32"  # of the computation: float32 or bfloat16; parameters are float32
  remat: str = "full"  # recompute in the backward pass: full (a block), dots (keep products), none
  tied_embeddings: bool = True  # read out with the embedding's table
  memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
  attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
  product_keys: ProductKeysConfig = dataclasses.field(default_factory=ProductKeysConfig)

  def __post_init__(self):
    for field in _LISTS:
      object.__setattr__(self, field, _listed(getattr(self, field)))

  @property
  def period(self) -> int:
    """Blocks after which both patterns begin again; the model repeats them."""
    return math.lcm(len(self.pattern), len(self.feed_forward))

  @property
  def repeats(self) -> int:
    """Times that the model repeats its `period` blocks."""
    return self.layers // self.period

  @property
  def mixers(self) -> tuple[type[Mixer], ...]:
    """The mixers of one period."""
    return tuple(layer.LAYERS[self.pattern[i % len(self.pattern)]] for i in range(self.period))

  @property
  def feed_forwards(self) -> tuple[type[FeedForward], ...]:
    """The feed-forward networks of one period."""
    return tuple(layer.LAYERS[self.feed_forward[i % len(self.feed_forward)]] for i in range(self.period))

  @property
  def kinds(self) -> tuple[type[Layer], ...]:
    """Every kind of layer that the model has, once."""
    return tuple(dict.fromkeys((*self.mixers, *self.feed_forwards)))

  @property
  def has_memories(self) -> bool:
    """Whether a layer has memories, which model.memory describes."""
    return any(kind.has_memories for kind in self.mixers)

  @property
  def learns_densely(self) -> bool:
    """Whether training does well to begin with model.memory.dense."""
    return any(kind.learns_densely(self) for kind in self.mixers)

  @property
  def label(self) -> str:
    """The mixers in words, for logs: "titans + grm / attention"."""
    return " / ".join(layer.LAYERS[name].label(self) for name in self.pattern)

  @property
  def head_dim(self) -> int:
    """Width of one head: q, k, v and u are [batch, length, heads, head_dim]."""
    return self.d_model // self.heads

  @property
  def hidden_dim(self) -> int:
    """Hidden width of the SwiGLU, with 0 resolved."""
    return self.mlp_dim or -(-8 * self.d_model // (3 * 64)) * 64

  @property
  def ages(self) -> int:
    """How many memories a token of a row of max_length can see: one per segment at most."""
    if self.memory.segmentation == "logarithmic":
      return self.max_length.bit_length()  # a shorter row may have more segments than a longer one
    return len(self.memory.build_segmentation().lengths(self.max_length))

  def problems(self, prefix: str = "model") -> list[str]:
    """Everything wrong with these values, each line naming the field and the valid values."""
    found = [
      *lines.choices(prefix, self, dtype=DTYPES, remat=REMATS),
      *lines.at_least(
        prefix,
        self,
        vocab_size=2,
        layers=1,
        d_model=1,
        heads=1,
        mlp_dim=0,
        conv_width=1,
        max_length=1,
      ),
      *self.memory.problems(f"{prefix}.memory"),
      *self.attention.problems(f"{prefix}.attention"),
      *self.product_keys.problems(f"{prefix}.product_keys"),
    ]
    unknown = self.unknown_layers(prefix)
    found += unknown
    if not unknown and self.layers >= 1 and self.layers % self.period:
      several = ", ".join(str(n * self.period) for n in (1, 2, 3))
      found.append(
        f"{prefix}.layers={self.layers} must be a multiple of the lengths of {prefix}.pattern={','.join(self.pattern)} "
        f"and {prefix}.feed_forward={','.join(self.feed_forward)}: use {several}, ..., or other patterns"
      )
    if not unknown and self.memory.after_training and not self.has_memories:
      found.append(
        f"{prefix}.memory.after_training={self.memory.after_training!r} needs memories: a {prefix}.pattern with "
        f"{with_memories()}, got {','.join(self.pattern)}"
      )
    if self.heads >= 1 and self.d_model >= 1:
      if self.d_model % self.heads:
        divisors = [n for n in range(1, self.d_model + 1) if self.d_model % n == 0]
        found.append(
          f"{prefix}.heads={self.heads} does not divide {prefix}.d_model={self.d_model}: "
          f"use one of {', '.join(map(str, divisors))}, or another d_model"
        )
      elif not unknown:
        found += [problem for kind in self.kinds for problem in kind.problems(self, prefix)]
    return found

  def data_problems(self, length: int, documents: bool) -> list[str]:
    """Why rows of `length` tokens, of several documents or not, cannot be trained on, a line each."""
    return [problem for kind in self.kinds for problem in kind.data_problems(self, length, documents)]

  def mesh_problems(self, length: int, sizes: dict[str, int]) -> list[str]:
    """What a mesh of these sizes, {axis: size}, does not divide in rows of `length` tokens, a line each."""
    return [
      *lines.indivisible(self.d_model, f"model.d_model={self.d_model}", sizes, "fsdp", "context"),
      *dict.fromkeys(problem for kind in self.kinds for problem in kind.mesh_problems(self, length, sizes)),
      *lines.indivisible(self.vocab_size, f"model.vocab_size={self.vocab_size}", sizes, "model"),
    ]

  def unknown_layers(self, prefix: str = "model") -> list[str]:
    """A line for each pattern that is empty or names a layer that does not exist; then layers cannot be asked."""
    valid = {"pattern": layer.names(Mixer), "feed_forward": layer.names(FeedForward)}

    def shown(value):
      plain = isinstance(value, tuple) and value and all(isinstance(name, str) for name in value)
      return ",".join(value) if plain else repr(value)

    return [
      f"{prefix}.{field}={shown(getattr(self, field))} must be one or more of {', '.join(names)}"
      for field, names in valid.items()
      if not isinstance(getattr(self, field), tuple) or not set() < set(getattr(self, field)) <= set(names)
    ]


def with_memories() -> str:
  """The entries of a pattern that have memories, for messages."""
  return " or ".join(name for name in layer.names(Mixer) if layer.LAYERS[name].has_memories)


_LISTS = ("pattern", "feed_forward")


def _listed(value):
  """A tuple of names, from a tuple, a list (as in JSON) or a text with commas (as a flag is); others as they are."""
  if isinstance(value, str):
    return tuple(name.strip() for name in value.strip("()[] ").split(",") if name.strip())
  if isinstance(value, (tuple, list)) and all(isinstance(name, str) for name in value):
    return tuple(name for part in value for name in _listed(part))
  return tuple(value) if isinstance(value, list) else value


# Fields that were once, and what is written now.
REPLACED = {
  "mixer": "model.pattern (mixer='transformer' is pattern=attention, mixer='memory_caching' is pattern=memory)",
  "rope_theta": "model.attention.rope_theta",
}
_PATTERN_OF_MIXER = {"memory_caching": "memory", "transformer": "attention"}


def completed(tree: dict) -> dict:
  """A stored model's fields, a nested dict by whatever release it was written, as they are called and meant now.

  What it lacks is not always what the default is: memories wrote as printed before there was `normalized`, and ssc
  never read all caches before there was `dense_steps`. Parameters are called as ever where a pattern has one entry, and
  before there were patterns none had more.
  """
  tree = dict(tree)
  if "mixer" in tree:
    mixer = tree.pop("mixer")
    tree["pattern"] = (_PATTERN_OF_MIXER.get(mixer, mixer),)
  if "rope_theta" in tree:
    tree["attention"] = {"rope_theta": tree.pop("rope_theta")}
  stored = tree.get("memory", {})
  then = {"dense_steps": 0}
  rule = stored.get("rule", MemoryConfig.rule)
  if rule in rules.names() and "normalized" in rules.options(rule):
    then["normalized"] = False
  return tree | {"memory": then | stored}


def from_stored(tree: dict) -> ModelConfig:
  """The model of a stored tree whose fields exist, by whatever release it was written."""
  tree = completed(tree)
  parts = {name: kind(**tree[name]) for name, kind in PARTS.items() if name in tree}
  return require_registered(ModelConfig(**(tree | parts)))


def require_registered(config: ModelConfig) -> ModelConfig:
  """The model; ConfigError if it names a rule, an aggregation or a layer that nobody has registered in this program."""
  names = {"rule": rules.names(), "aggregation": tuple(aggregate.AGGREGATIONS)}
  unknown = [*config.unknown_layers(), *lines.choices("model.memory", config.memory, **names)]
  if unknown:
    raise ConfigError("\n".join(f"{line}: import what registers it" for line in unknown))
  return config


# Fields that say how a model is computed, not what it computes: two models may differ in them and share parameters,
# caches and checkpoints. dense_steps is of training alone.
COMPUTATION = (
  "remat",
  "memory.implementation",
  "memory.segment_group",
  "memory.read_buffer_mib",
  "memory.dense_steps",
)
PARTS = {
  "memory": MemoryConfig,
  "attention": AttentionConfig,
  "product_keys": ProductKeysConfig,
}  # groups of a model's fields
