"""TPUs that are not there: topologies to compile for ahead of time.

The package libtpu holds the whole TPU compiler and needs no TPU. On a machine without one, run with JAX_PLATFORMS=cpu.
"""

import functools
import os

import jax
import numpy as np
from jax.experimental import topologies

# What libtpu would ask the machine that it thinks it is on. It reads them once, when it is loaded.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # whatever topology is asked for afterwards
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two processes would otherwise fight over a lock file
}


@functools.cache
def topology(name: str, slices: int = 1) -> topologies.TopologyDescription:
  """The topology called, for example, "v5e:2x2" or "v4:2x2x1"; several slices of it, joined by a data-centre network.

  Needs the package libtpu.
  """
  for variable, value in _ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  options = {}
  if slices > 1:
    options["num_slices"] = slices
  if name.startswith("v4:"):
    options["chip_config_name"] = "megacore"  # both cores are one device, as on Cloud TPU
  return topologies.get_topology_desc(name, "tpu", **options)


def mesh(name: str, axes: dict[str, int]) -> jax.sharding.Mesh:
  """A mesh of the topology's first devices: {axis: size}, axes as `jax.shard_map` and shardings want them."""
  sizes = tuple(axes.values())
  devices = np.array(topology(name).devices[: np.prod(sizes)]).reshape(sizes)
  return jax.sharding.Mesh(devices, tuple(axes))


def one_chip(name: str) -> jax.sharding.NamedSharding:
  """The sharding that puts an array on one chip: for `jax.ShapeDtypeStruct(shape, dtype, sharding=...)`."""
  return jax.sharding.NamedSharding(mesh(name, {"chip": 1}), jax.sharding.PartitionSpec())
