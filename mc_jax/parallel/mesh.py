"""The device mesh: four named axes over the devices of one slice, or of several."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

# Outermost first: neighbours on the last axes are neighbours on the interconnect, and talk most.
AXES = ("data", "fsdp", "context", "model")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices each axis has; one of them may be -1, for all that are left."""

  data: int = -1  # replicas, each with rows of its own; several slices lie along this axis
  fsdp: int = 1  # rows are split, and so are parameters and optimiser state, gathered layer by layer
  context: int = 1  # the sequence is split: each device writes the segments that it holds
  model: int = 1  # heads, the feed-forward network's width and the vocabulary are split

  def problems(self, prefix: str = "mesh") -> list[str]:
    """Everything wrong with these values whatever the devices, each line naming the field and the valid values."""
    sizes = {axis: getattr(self, axis) for axis in AXES}
    found = [
      f"{prefix}.{axis}={size} must be at least 1, or -1 for all the devices that are left"
      for axis, size in sizes.items()
      if size < 1 and size != -1
    ]
    free = [f"{prefix}.{axis}" for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
      found.append(f"only one of {', '.join(free)} can be -1 (all the devices that are left)")
    return found

  def sizes(self, devices: int) -> dict[str, int]:
    """The size of every axis on so many devices, {axis: size}, in the order of AXES.

    Raises:
      ValueError: the sizes do not make use of exactly these devices.
    """
    sizes = {axis: getattr(self, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    given = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if devices % fixed or (fixed != devices and -1 not in sizes.values()):
      raise ValueError(
        f"{given} does not fit {devices} device(s): the product of the sizes must be {devices}, and a size of -1 "
        f"needs the product of the others ({fixed}) to divide it"
      )
    return {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}


def make(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """The mesh of these devices (default: all of the job's), every axis under XLA's automatic partitioning.

  Devices of several slices, joined by a data-centre network, are laid out so that only the axis "data" crosses it.

  Raises:
    ValueError: the sizes do not fit the devices, or "data" is not a multiple of the slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = config.sizes(len(devices))
  shape = tuple(sizes.values())
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices > 1:
    if sizes["data"] % slices:
      raise ValueError(f"mesh.data={sizes['data']} must be a multiple of the {slices} slices, which lie along it")
    within = (shape[0] // slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
  elif devices[0].platform == "tpu":
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    grid = np.array(devices).reshape(shape)
  return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def sizes_in_context() -> dict[str, int]:
  """Sizes of the mesh that is set (`jax.set_mesh`), {axis: size}; 1 for every axis where none is."""
  return dict.fromkeys(AXES, 1) | dict(jax.sharding.get_abstract_mesh().shape)
