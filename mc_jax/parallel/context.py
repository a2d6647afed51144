"""Memory Caching on a mesh: rows and heads are split, and the sequence, of which each device has its own segments.

The functions of mc_jax/memory run inside `jax.shard_map`, so that no kernel ever forces a gather. Devices exchange
data in four places: what its first segment starts from (writing.py), the
segments' summaries (all of them, everywhere: one key for each segment and head), the caches (reading.py), and those
that were selected (selecting.py).
"""

import functools

import jax

from mc_jax import memory
from mc_jax.memory import caching
from mc_jax.parallel import axes, mesh, reading, selecting, writing
from mc_jax.parallel import parts as parts_lib


class Parts(parts_lib.Parts):
  """The parts of a sequence, and the passes over all of it."""

  def backend(self, local: caching.Backend) -> caching.Backend:
    """The passes over the whole sequence, by passes over what is here."""
    return caching.Backend(
      functools.partial(writing.write, self, local.write),
      functools.partial(reading.read_caches, self, local.read_caches),
      functools.partial(selecting.read_selected, self, local.read_selected),
    )


def run(
  tokens: memory.Tokens,
  init: memory.networks.Weights,
  options: memory.Options,
  *,
  read_buffer: int = 256 << 20,
) -> jax.Array:
  """`memory.run` on the mesh that is set (`jax.set_mesh`); the same numbers as without one.

  Its arguments, and:
    read_buffer: bytes that a device gathers from others at a time, to read their caches; at least a state of each.

  Raises:
    ValueError: as `memory.run`, or sizes that the mesh does not divide.
  """
  sizes = mesh.sizes_in_context()
  if all(size == 1 for size in sizes.values()):
    return caching.run(tokens, init, options)
  memory.tokens.check(tokens, init, options)
  check(tokens.q.shape, sizes, options)
  parts = caching.Whole()
  if sizes["context"] > 1:
    parts = Parts(sizes["context"], "context", read_buffer)
  local = functools.partial(caching.run_part, options=options, parts=parts)
  heads = axes.spec(axes.HEADS, sizes)
  in_specs = token_specs(tokens, sizes), jax.tree.map(lambda _: axes.spec(("heads", None, None), sizes), init)
  return jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=False)(tokens, init)


def token_specs(tokens: memory.Tokens, sizes: dict[str, int]) -> memory.Tokens:
  """Where tokens lie: the PartitionSpec of each array."""
  names = {2: axes.TOKENS, 3: axes.HEADS[:3], 4: axes.HEADS}
  return jax.tree.map(lambda x: axes.spec(names[x.ndim], sizes), tokens)


def check(shape: tuple[int, ...], sizes: dict[str, int], options: memory.Options) -> None:
  """Raises ValueError where q's shape [batch, length, heads, head_dim] and a mesh of these sizes do not go together."""
  batch, length, heads, _ = shape
  rows, context = axes.shards("batch", sizes), sizes["context"]
  if batch % rows:
    raise ValueError(f"batch={batch} must be a multiple of the mesh's data x fsdp = {rows}")
  if heads % sizes["model"]:
    raise ValueError(f"heads={heads} must be a multiple of the mesh's model={sizes['model']}")
  if options.implementation == "reference":
    raise ValueError("implementation='reference' runs on one device; use 'xla' on a mesh")
  if context == 1:
    return
  if not memory.segments.divides(options.segmentation, length, context):
    lengths = options.segmentation.lengths(length)
    raise ValueError(
      f"length={length} is cut into {len(lengths)} segments, the first of {lengths[0]} tokens, the last of "
      f"{lengths[-1]}: the mesh's context={context} needs segments of one length, and a multiple of {context} of them"
    )
  if length // context <= options.rule.lookback:
    raise ValueError(
      f"length={length} on context={context} devices must leave each a window of {options.rule.lookback + 1} tokens"
    )
