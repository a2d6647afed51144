"""Heads and widths of a memory layer, and how many numbers its memories are."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from mc_jax import memory
from mc_jax.models import forms

if TYPE_CHECKING:
  from mc_jax.models.config import ModelConfig


class Sizes(NamedTuple):
  """Heads and widths of a layer.

  Attributes:
    key_heads: heads of queries, keys and connectors. Memory m has those of head m // (memories / key_heads).
    memories: heads of values, output gates and the rule's gates.
    key_dim, value_dim: widths of a head's keys and of its values.
  """

  key_heads: int
  memories: int
  key_dim: int
  value_dim: int

  @property
  def shared(self) -> int:
    """Memories that share a query and a key."""
    return self.memories // self.key_heads

  @property
  def keys(self) -> dict[str, int]:
    """Names and sizes of the axes of queries and keys after the tokens'."""
    return {"heads": self.key_heads, "head_dim": self.key_dim}

  @property
  def values(self) -> dict[str, int]:
    """The same of values."""
    return {"heads": self.memories, "head_dim": self.value_dim}


def sizes(config: ModelConfig) -> Sizes:
  """Heads and widths of a model's memory layers."""
  options, form = config.memory, forms.of(config.memory)
  key_dim = config.head_dim if options.key_dim is None else options.key_dim
  expand_v = form.expand_v if options.expand_v is None else options.expand_v
  key_heads = options.key_heads or form.key_heads or config.heads
  return Sizes(key_heads, options.value_heads or config.heads, key_dim, round(expand_v * key_dim))


def channels(config: ModelConfig) -> int:
  """Channels that are mapped from and to the residual stream, connectors in any case."""
  widths, gate = sizes(config), forms.of(config.memory).output_gate is not None
  return 3 * math.prod(widths.keys.values()) + (3 if gate else 2) * math.prod(widths.values.values())


def memories_field(config: ModelConfig, prefix: str) -> str:
  """The field that says how many memories there are, with its value."""
  if config.memory.value_heads is None:
    return f"{prefix}.heads={config.heads}"
  return f"{prefix}.memory.value_heads={config.memory.value_heads}"


def fresh(rule: memory.rules.Rule, sizes: Sizes, key: jax.Array) -> memory.networks.Weights:
  """M_0 of a layer's memories, {weight: [memories, in, out]} float32."""
  return rule.init(key, heads=sizes.memories, head_dim=sizes.key_dim, value_dim=sizes.value_dim)


def memory_numbers(config: ModelConfig) -> int:
  """Numbers in one head's memory."""
  return _numbers(functools.partial(fresh, config.memory.build_rule(), _one_memory(config)))


def state_numbers(config: ModelConfig) -> int:
  """Numbers in what one head's memory carries from segment to segment: momentum with it, where there is any."""
  rule, one = config.memory.build_rule(), _one_memory(config)
  return _numbers(lambda key: rule.start(fresh(rule, one, key), jnp.zeros((1, 1, 1, one.key_dim))))


def _one_memory(config: ModelConfig) -> Sizes:
  return sizes(config)._replace(memories=1)


def _numbers(make) -> int:
  """Numbers in what `make` makes of a random key."""
  return sum(math.prod(w.shape) for w in jax.tree.leaves(jax.eval_shape(lambda: make(jax.random.key(0)))))
