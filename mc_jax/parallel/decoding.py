"""Decoding on a mesh: rows and heads are split; a sequence's cache is where its row and head are."""

import jax

from mc_jax import memory
from mc_jax.memory import decode
from mc_jax.parallel import axes, context, mesh

_WEIGHTS = ("heads",)


def init_cache(options: decode.Options, init: memory.networks.Weights, **sizes) -> decode.Cache:
  """`memory.decode.init_cache`, laid out on the mesh that is set (`jax.set_mesh`)."""
  cache = decode.init_cache(options, init, **sizes)
  return jax.tree.map(axes.constrain, cache, _names(cache))


def prefill(
  options: decode.Options,
  tokens: memory.Tokens,
  init: memory.networks.Weights,
  *,
  lengths: jax.Array | None = None,
) -> tuple[jax.Array, decode.Cache]:
  """`memory.decode.prefill` on the mesh that is set.

  Raises:
    ValueError: the mesh splits sequences.
  """

  def run(tokens, init, _, lengths):
    return decode.prefill(options, tokens, init, lengths=lengths)

  return _sharded(run, tokens, init, None, lengths)


def step(
  options: decode.Options,
  tokens: memory.Tokens,
  init: memory.networks.Weights,
  cache: decode.Cache,
  *,
  active: jax.Array | None = None,
) -> tuple[jax.Array, decode.Cache]:
  """`memory.decode.step` on the mesh that is set.

  Raises:
    ValueError: the mesh splits sequences.
  """

  def run(tokens, init, cache, active):
    return decode.step(options, tokens, init, cache, active=active)

  return _sharded(run, tokens, init, cache, active)


def _sharded(run, tokens, init, cache, rows):
  """run(tokens, init, cache, rows) to (y, cache), each device with its rows and heads."""
  sizes = mesh.sizes_in_context()
  if all(size == 1 for size in sizes.values()):
    return run(tokens, init, cache, rows)
  if sizes["context"] > 1:
    raise ValueError(f"decoding needs a mesh with context=1, got {sizes['context']}: a token is on one device")
  batch, _, heads = tokens.q.shape[:3]
  row_shards = axes.shards("batch", sizes)
  if batch % row_shards or heads % sizes["model"]:
    raise ValueError(
      f"a batch of {batch} and {heads} heads must be multiples of the mesh's data x fsdp = {row_shards} and "
      f"model = {sizes['model']}"
    )

  def specs(tree, names):
    return jax.tree.map(lambda _: axes.spec(names, sizes), tree)

  def cache_specs(cache):
    return jax.tree.map(lambda _, names: axes.spec(names, sizes), cache, _names(cache))

  _, after = jax.eval_shape(run, tokens, init, cache, rows)
  token_specs = context.token_specs(tokens, sizes)
  in_specs = token_specs, specs(init, _WEIGHTS), cache and cache_specs(cache), specs(rows, ("batch",))
  out_specs = token_specs.q, cache_specs(after)
  return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)(tokens, init, cache, rows)


def _names(cache: decode.Cache) -> decode.Cache:
  """The logical axes of each of a cache's arrays."""

  def like(tree, names):
    return jax.tree.map(lambda _: names, tree)

  rows, slots = ("batch", "heads"), (None, "batch", "heads")
  return decode.Cache(
    position=("batch",),
    state=like(cache.state, rows),
    chunk=like(cache.chunk, rows),
    keys=rows,
    memories=like(cache.memories, slots),
    summaries=slots,
    first=(),
  )
