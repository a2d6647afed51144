"""Decoding on a mesh: rows and heads are split; a sequence's cache is where its row and head are."""

import functools

import jax

from mc_jax import memory
from mc_jax.memory import decode
from mc_jax.parallel import axes, mesh

_TOKENS = ("batch", None, "heads")
_WEIGHTS = ("heads",)


def init_cache(options: decode.Options, init: memory.networks.Weights, **sizes) -> decode.Cache:
  """`memory.decode.init_cache`, laid out on the mesh that is set (`jax.set_mesh`)."""
  cache = decode.init_cache(options, init, **sizes)
  return jax.tree.map(axes.constrain, cache, _names(cache))


def prefill(options, q, k, v, u, gates, init, *, lengths=None, token_scores=None):
  """`memory.decode.prefill` on the mesh that is set.

  Raises:
    ValueError: the mesh splits sequences.
  """
  run = functools.partial(_prefill, options)
  return _sharded(run, dict(q=q, k=k, v=v, u=u, token_scores=token_scores), gates, init, None, lengths)


def step(options, q, k, v, u, gates, init, cache, *, token_scores=None, active=None):
  """`memory.decode.step` on the mesh that is set.

  Raises:
    ValueError: the mesh splits sequences.
  """
  run = functools.partial(_step, options)
  return _sharded(run, dict(q=q, k=k, v=v, u=u, token_scores=token_scores), gates, init, cache, active)


def _prefill(options, tokens, gates, init, _, lengths):
  return decode.prefill(options, **tokens, gates=gates, init=init, lengths=lengths)


def _step(options, tokens, gates, init, cache, active):
  return decode.step(options, **tokens, gates=gates, init=init, cache=cache, active=active)


def _sharded(run, tokens, gates, init, cache, rows):
  """run(tokens, gates, init, cache, rows) to (y, cache), each device with its rows and heads."""
  sizes = mesh.sizes_in_context()
  arguments = tokens, gates, init, cache, rows
  if all(size == 1 for size in sizes.values()):
    return run(*arguments)
  if sizes["context"] > 1:
    raise ValueError(f"decoding needs a mesh with context=1, got {sizes['context']}: a token is on one device")
  batch, _, heads = tokens["q"].shape[:3]
  if batch % (sizes["data"] * sizes["fsdp"]) or heads % sizes["model"]:
    raise ValueError(
      f"a batch of {batch} and {heads} heads must be multiples of the mesh's data x fsdp = "
      f"{sizes['data'] * sizes['fsdp']} and model = {sizes['model']}"
    )

  def specs(tree, names):
    return jax.tree.map(lambda _: axes.spec(names, sizes), tree)

  def cache_specs(cache):
    return jax.tree.map(lambda _, names: axes.spec(names, sizes), cache, _names(cache))

  y, after = jax.eval_shape(run, *arguments)
  inputs = specs(tokens, _TOKENS), specs(gates, _TOKENS), specs(init, _WEIGHTS), cache and cache_specs(cache)
  outputs = specs(y, _TOKENS), cache_specs(after)
  in_specs = (*inputs, specs(rows, ("batch",)))
  return jax.shard_map(run, in_specs=in_specs, out_specs=outputs, check_vma=False)(*arguments)


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
