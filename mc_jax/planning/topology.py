"""TPU topologies to compile for ahead of time, on a machine without TPUs.

The package libtpu contains the whole TPU compiler. On a machine without a TPU, run with JAX_PLATFORMS=cpu.
"""

import functools
import os

import jax
import numpy as np
from jax.experimental import topologies

from mc_jax.errors import ConfigError

# Answers to what libtpu would query on a TPU VM. It reads them once, when it is loaded.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # whichever topology is requested later
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two processes would otherwise fight over a lock file
}


@functools.cache
def topology(name: str, slices: int = 1) -> topologies.TopologyDescription:
  """A topology such as "v5e:2x2" or "v4:2x2x1", or several slices of it joined by a data-centre network.

  Requires the package libtpu.
  """
  for variable, value in _ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  options = {}
  if slices > 1:
    options["num_slices"] = slices
  if name.startswith("v4:"):
    options["chip_config_name"] = "megacore"  # both cores are one device, as on Cloud TPU
  return topologies.get_topology_desc(name, "tpu", **options)


def devices(name: str, slices: int = 1) -> list[jax.Device]:
  """The devices of a topology.

  Raises:
    ConfigError: No topology has this name.
  """
  try:
    return topology(name, slices).devices
  except (ImportError, RuntimeError, ValueError) as error:
    reason = str(error).strip().splitlines()[0]
    raise ConfigError(
      f"--topology={name}: {reason}. Valid topologies include v4:2x2x1, v5e:2x2 to v5e:16x16, v5p:2x2x1 to "
      "v5p:8x8x8, v6e:2x2 to v6e:16x16, tpu7x:2x2x1"
    ) from error


def mesh(name: str, axes: dict[str, int]) -> jax.sharding.Mesh:
  """A mesh {axis: size} of the topology's first devices, with axes for `jax.shard_map` and shardings."""
  sizes = tuple(axes.values())
  array = np.array(devices(name)[: np.prod(sizes)]).reshape(sizes)
  return jax.sharding.Mesh(array, tuple(axes))


def one_chip(name: str) -> jax.sharding.NamedSharding:
  """The sharding that places an array on one chip, for `jax.ShapeDtypeStruct(shape, dtype, sharding=...)`."""
  return jax.sharding.NamedSharding(mesh(name, {"chip": 1}), jax.sharding.PartitionSpec())
