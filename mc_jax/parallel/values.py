"""Memory layers on a mesh: tokens are split as ever, the table of values by their width.

A device has a slice of every value, of mesh.model x mesh.fsdp. Devices of an fsdp group have rows of their own, so what
they read is gathered from the group, each sums its slice for all of the group's tokens, and slices are exchanged for
whole values of a device's own tokens (arXiv:2412.09764, section 3.1). Split by rows instead, a value would lie on one
device: those that are read most would make some devices wait for others, and every token would have to be sent to many.
Along the axis model nothing is exchanged, for its devices have the same tokens: the next projection takes slices.
"""

from collections.abc import Callable

import jax
from jax import lax

from mc_jax.parallel import axes
from mc_jax.parallel import mesh as meshes

_GROUP = "fsdp"


def look_up(
  local: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]], queries: jax.Array, codebooks: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """local(queries, codebooks) on the mesh that is set: rows, the sequence and heads are split.

  Args:
    local: (queries, codebooks) to (weights, rows) [batch, length, heads, k].
    queries: [batch, length, heads, key_dim].
    codebooks: [heads, 2, n, key_dim / 2].
  """
  sizes = meshes.sizes_in_context()
  if all(size == 1 for size in sizes.values()):
    return local(queries, codebooks)
  spec = axes.spec(axes.HEADS, sizes, queries.shape)
  specs = spec, jax.P(spec[2])
  return jax.shard_map(local, in_specs=specs, out_specs=(spec, spec), check_vma=False)(queries, codebooks)


def read(
  local: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], values: jax.Array, rows: jax.Array, weights: jax.Array
) -> jax.Array:
  """local(values, rows, weights) on the mesh that is set.

  Args:
    local: (values [N, width], rows, weights) to [batch, length, width]; called with a slice of the values.
    values: [N, value_dim].
    rows, weights: [batch, length, heads, k].

  Returns:
    [batch, length, value_dim], its width split over mesh.model.
  """
  sizes = meshes.sizes_in_context()
  if all(size == 1 for size in sizes.values()):
    return local(values, rows, weights)
  tokens = axes.spec(axes.TOKENS, sizes, rows.shape[:2])
  table = axes.spec((None, "value"), sizes, values.shape)
  split_by = _names(table[1])
  gathers = _GROUP in split_by and _GROUP in _names(tokens[0])

  def part(values, rows, weights):
    if gathers:
      rows, weights = (lax.all_gather(x, _GROUP, axis=0, tiled=True) for x in (rows, weights))
    y = local(values, rows, weights)
    if gathers:
      return lax.all_to_all(y, _GROUP, split_axis=0, concat_axis=2, tiled=True)
    return lax.all_gather(y, _GROUP, axis=2, tiled=True) if _GROUP in split_by else y

  out = jax.P(*tokens, "model" if "model" in split_by else None)
  return jax.shard_map(part, in_specs=(table, tokens, tokens), out_specs=out, check_vma=False)(values, rows, weights)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes of an entry of a PartitionSpec."""
  return (entry,) if isinstance(entry, str) else entry or ()
