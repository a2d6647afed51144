"""Looking into a model while it reads: what its memories hold, which caches and which values its tokens read."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from mc_jax.memory import caching
from mc_jax.models.language_model import LanguageModel, number_documents

Found = TypeVar("Found")  # a pytree of arrays


def look(
  model: LanguageModel, tokens: jax.Array, segment_ids: jax.Array | None, tell: Callable[[caching.Cached], Found]
) -> Found:
  """What `tell` makes of each layer's memories, every leaf stacked on a leading axis: the layers that have memories.

  The layers are run as always, by XLA.

  Args:
    model: with memories, see `ModelConfig.has_memories`.
    tokens, segment_ids: as of a call of the model.
    tell: is traced once for each place in the model's period.
  """
  document = None if segment_ids is None else number_documents(segment_ids)
  _, found = model.run(model.embed(tokens), model.context(document=document, observe=tell))
  return _in_order(found)


def values_read(model: LanguageModel, tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """The weight that all tokens but padding have on each row of the memory layers' tables, [layers, rows] float32.

  Args:
    model: with memory layers, see `ModelConfig.has_values`.
    tokens, segment_ids: as of a call of the model.
  """
  document = None if segment_ids is None else number_documents(segment_ids)
  return _in_order(model.run(model.embed(tokens), model.context(document=document, count=True))[1])


def spread(mass: jax.Array) -> tuple[jax.Array, jax.Array]:
  """How evenly weight [..., rows] lies on rows: the share of rows that have any, and KL(shares || uniform) in nats."""
  share = mass / mass.sum(-1, keepdims=True)
  divergence = jnp.log(mass.shape[-1]) - jax.scipy.special.entr(share).sum(-1)
  return jnp.mean(mass > 0, -1), divergence


def _in_order(found: tuple) -> Found:
  """What blocks left, for each place in the period, as one tree with the layers in their order on a leading axis."""
  found = [each for each in found if each is not None]
  if len(found) == 1:
    return found[0]
  # The first of each place in the period, then the second.
  return jax.tree.map(lambda *each: jnp.stack(each, 1).reshape(-1, *each[0].shape[1:]), *found)
