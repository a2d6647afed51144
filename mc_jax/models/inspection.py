"""Looking into a model while it reads: what its memories hold, and which caches its tokens read."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

from mc_jax.memory import caching
from mc_jax.models.language_model import LanguageModel, number_documents
from mc_jax.models.mixer import MemoryCaching
from mc_jax.parallel import axes

Found = TypeVar("Found")  # a pytree of arrays


def look(
  model: LanguageModel, tokens: jax.Array, segment_ids: jax.Array | None, tell: Callable[[caching.Cached], Found]
) -> Found:
  """What `tell` makes of each layer's memories, every leaf stacked on a leading axis "layers".

  The layers are run as always, by XLA.

  Args:
    model: whose mixers are memories.
    tokens, segment_ids: as of a call of the model.
    tell: is traced once.
  """
  document = None if segment_ids is None else number_documents(segment_ids)
  graph, layers = nnx.split(model.blocks)

  def block(x, layer):
    block = nnx.merge(graph, layer)
    y, cached = _read(block.mixer, block.mixer_norm(x), document)
    return block.after_mixer(x, y), tell(cached)

  _, found = jax.lax.scan(block, axes.constrain(model.embed(tokens), axes.RESIDUAL), layers)
  return found


def _read(mixer: MemoryCaching, x: jax.Array, document: jax.Array | None) -> tuple[jax.Array, caching.Cached]:
  """A call of the mixer on x [batch, length, d_model], and what its passes leave behind."""
  inputs = mixer.project(x, document)
  options = dataclasses.replace(mixer.config.memory.build_options(), implementation="xla")
  y, cached = caching.run_part(inputs.tokens, mixer.initial_memory(), options, keep=True)
  return mixer.read_out(y, inputs, document), cached
