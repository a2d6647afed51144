"""The one table that says where everything lies: logical axes of arrays, and the mesh axes that split them."""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

from mc_jax.parallel import mesh as meshes

# Parameters, optimiser state, activations, gates and cached memories are made of these axes. What the table does not
# name (head_dim, layers, conv_width, ...) is whole on every device.
RULES: dict[str, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  "length": ("context",),
  "segment": ("context",),  # of cached memories: where the segment's tokens are
  "heads": ("model",),
  "mlp": ("model",),
  "vocab": ("model",),
  "embed": ("fsdp", "context"),  # of parameters alone; the residual stream's width is whole
  "memory_out": ("fsdp", "context"),  # of a learned M_0
  "value": ("model", "fsdp"),  # width of a memory layer's values: every device has a slice of all of them
}

# Axes that no activation has.
_PARAMETERS_ONLY = ("embed", "memory_out")

# Names of the activations' axes, where the code that computes them stands.
TOKENS = ("batch", "length")
RESIDUAL = ("batch", "length", None)
HEADS = ("batch", "length", "heads", None)


def spec(axes: Sequence[str | None], sizes: dict[str, int], shape: Sequence[int] | None = None) -> PartitionSpec:
  """The PartitionSpec of an array whose axes have these logical names.

  Args:
    axes: a name, or None, per axis of the array.
    sizes: of the mesh's axes.
    shape: of the array, if given: mesh axes that do not divide an axis, the last first, leave it whole.
  """
  entries = []
  for i, name in enumerate(axes):
    names = tuple(axis for axis in RULES.get(name, ()) if sizes[axis] > 1)
    while shape is not None and names and shape[i] % math.prod(sizes[axis] for axis in names):
      names = names[:-1]
    entries.append(names if len(names) > 1 else names[0] if names else None)
  return PartitionSpec(*entries)


def shards(name: str, sizes: Mapping[str, int]) -> int:
  """The number of parts that a mesh with these sizes, {axis: size}, splits the logical axis `name` into."""
  return math.prod(sizes[axis] for axis in RULES[name])


def sharding(mesh: jax.sharding.Mesh, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> NamedSharding:
  """Where an array lies on a mesh: `spec` with the mesh."""
  return NamedSharding(mesh, spec(axes, dict(mesh.shape), shape))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """x, laid out as its axes say on the mesh that is set; as it is where none is set."""
  sizes = meshes.sizes_in_context()
  if all(size == 1 for size in sizes.values()):
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, sizes, x.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """A parameter, ready to be multiplied: whole along the axes that only spread parameters over devices.

  Its gradient is scattered over them again as it is added up. Called after the cast to the computation's dtype, so
  that as few bytes as possible are sent.
  """
  return constrain(x, _whole(axes))


def _whole(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
  return tuple(None if name in _PARAMETERS_ONLY else name for name in axes)


gathered.defvjp(
  lambda x, axes: (gathered(x, axes), None),
  # In two steps: asked for a part of a gradient at once, XLA would send every token's share of it to everyone.
  lambda axes, _, cotangent: (constrain(constrain(cotangent, _whole(axes)), axes),),
)
