"""Looking into a model while it reads: what its memories hold, and which caches its tokens read."""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

from mc_jax import memory
from mc_jax.memory import caching
from mc_jax.models.language_model import LanguageModel, number_documents
from mc_jax.models.mixer import MemoryCaching

Found = TypeVar("Found")  # a pytree of arrays


def look(
  model: LanguageModel, tokens: jax.Array, segment_ids: jax.Array | None, tell: Callable[[caching.Cached], Found]
) -> Found:
  """What `tell` makes of each layer's memories, every leaf stacked on a leading axis "layers".

  The layers are run as always, twice (once to be looked at), by XLA. Of what is computed for the second look, only what
  `tell` asks for is.

  Args:
    model: whose mixers are memories.
    tokens, segment_ids: as of a call of the model.
    tell: is traced once.
  """
  document = None if segment_ids is None else number_documents(segment_ids)
  graph, layers = nnx.split(model.blocks)

  def block(x, layer):
    block = nnx.merge(graph, layer)
    return block(x, document), tell(_cached(block.mixer, block.mixer_norm(x), document))

  _, found = jax.lax.scan(block, model.embed(tokens), layers)
  return found


def _cached(mixer: MemoryCaching, x: jax.Array, document: jax.Array | None) -> caching.Cached:
  """Of one layer, whose mixer reads x [batch, length, d_model]."""
  options, inputs = mixer.config.memory, mixer.project(x, document)
  _, cached = caching.caching_of_part(
    *inputs[:4],
    inputs.gates,
    mixer.initial_memory(),
    None if document is None else memory.documents.index(document),
    inputs.token_scores,
    rule=mixer.rule,
    aggregation=options.aggregation,
    segmentation=options.build_segmentation(),
    carry=options.carry,
    top_k=options.top_k,
    pool=options.pool,
    gate=options.gate,
    gate_scale=options.gate_scale,
    segment_group=options.segment_group,
    implementation="xla",
    keep=True,
  )
  return cached
