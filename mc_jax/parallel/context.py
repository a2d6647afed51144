"""Memory Caching on a mesh: rows and heads are split, and the sequence, of which each device has its own segments.

The functions of mc_jax/memory run inside `jax.shard_map`, so that no kernel ever forces a gather. What a part of a
sequence needs of the others is asked for in four places: what its first segment starts from (writing.py), the
segments' summaries (all of them, everywhere: one key for each segment and head), the caches (reading.py), and those
that were selected (selecting.py).
"""

import functools

import jax

from mc_jax import memory
from mc_jax.memory import arguments, caching
from mc_jax.memory import documents as documents_lib
from mc_jax.parallel import axes, mesh, reading, selecting, writing
from mc_jax.parallel import parts as parts_lib


class Parts(parts_lib.Parts):
  """The parts of a sequence, and the passes over all of it."""

  def passes(self, local: caching.Passes) -> caching.Passes:
    """The passes over the whole sequence, by passes over what is here."""
    return caching.Passes(
      functools.partial(writing.write, self, local.write),
      functools.partial(reading.read_caches, self, local.read_caches),
      functools.partial(selecting.read_selected, self, local.read_selected),
    )


def memory_caching(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  u: jax.Array,
  gates: dict[str, jax.Array],
  init: memory.networks.Weights,
  options: memory.Options,
  *,
  segment_ids: jax.Array | None = None,
  token_scores: jax.Array | None = None,
  read_buffer: int = 256 << 20,
) -> jax.Array:
  """`memory.memory_caching` on the mesh that is set (`jax.set_mesh`); the same numbers as without one.

  Its arguments, and:
    read_buffer: bytes that a device gathers from others at a time, to read their caches; at least a state of each.

  Raises:
    ValueError: as `memory.memory_caching`, or sizes that the mesh does not divide.
  """
  sizes = mesh.sizes_in_context()
  if all(size == 1 for size in sizes.values()):
    return caching.with_options(q, k, v, u, gates, init, options, segment_ids=segment_ids, token_scores=token_scores)
  rule, segmentation = options.rule, options.segmentation
  tokens = dict(q=q, k=k, v=v, u=u)
  arguments.check_arrays(tokens, gates, init, rule, segmentation, options.gate, segment_ids, token_scores)
  check(q.shape, sizes, rule, segmentation, options.implementation)

  def spec(*names):
    return axes.spec(names, sizes)

  heads = spec("batch", "length", "heads", None)
  tokens = spec("batch", "length")
  documents = None if segment_ids is None else documents_lib.index(segment_ids)
  arrays = {
    **dict.fromkeys("qkvu", heads),
    "gates": spec("batch", "length", "heads"),
    "init": spec("heads", None, None),
    "documents": tokens,
    "token_scores": heads,
  }
  parts = caching.Whole()
  if sizes["context"] > 1:
    parts = Parts(sizes["context"], "context", read_buffer)
  run = functools.partial(caching.caching_of_part, options=options, parts=parts)
  sharded = jax.shard_map(run, in_specs=tuple(arrays.values()), out_specs=heads, check_vma=False)
  return sharded(q, k, v, u, gates, init, documents, token_scores)


def check(
  shape: tuple[int, ...],
  sizes: dict[str, int],
  rule: memory.rules.Rule,
  segmentation: memory.segments.Segmentation,
  implementation: str | None,
) -> None:
  """Raises ValueError where q's shape [batch, length, heads, head_dim] and a mesh of these sizes do not go together."""
  batch, length, heads, _ = shape
  rows, context = sizes["data"] * sizes["fsdp"], sizes["context"]
  if batch % rows:
    raise ValueError(f"batch={batch} must be a multiple of the mesh's data x fsdp = {rows}")
  if heads % sizes["model"]:
    raise ValueError(f"heads={heads} must be a multiple of the mesh's model={sizes['model']}")
  if implementation == "reference":
    raise ValueError("implementation='reference' runs on one device; use 'xla' on a mesh")
  if context == 1:
    return
  lengths = segmentation.lengths(length)
  if len(set(lengths)) > 1 or len(lengths) % context:
    raise ValueError(
      f"length={length} is cut into {len(lengths)} segments, the first of {lengths[0]} tokens, the last of "
      f"{lengths[-1]}: the mesh's "
      f"context={context} needs segments of one length, and a multiple of {context} of them"
    )
  if length // context < rule.window:
    raise ValueError(f"length={length} on context={context} devices must leave each a window of {rule.window} tokens")
