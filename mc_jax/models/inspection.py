"""Looking into a model while it reads: what its memories hold, and which caches its tokens read."""

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
  found = [each for each in found if each is not None]
  if len(found) == 1:
    return found[0]
  # Layers in their order: the first of each place in the period, then the second.
  return jax.tree.map(lambda *each: jnp.stack(each, 1).reshape(-1, *each[0].shape[1:]), *found)
