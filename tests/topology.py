"""TPUs that are not there: topologies to compile for ahead of time. Import it before anything asks jax for devices.

libtpu holds the whole TPU compiler, and reads these variables once, when it is loaded.
"""

import functools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # whatever is asked for afterwards
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two processes would otherwise fight over a lock file

import jax
import numpy as np
import pytest
from jax.experimental import topologies


@functools.cache
def topology(name: str) -> topologies.TopologyDescription:
  """The topology called, for example, "v5e:2x2" or "v4:2x2x1"; skips the test without libtpu."""
  pytest.importorskip("libtpu", reason="compiles for TPUs")
  return topologies.get_topology_desc(name, "tpu")


def mesh(name: str, axes: dict[str, int]) -> jax.sharding.Mesh:
  """A mesh of the topology's first devices: {axis: size}, axes as `jax.shard_map` and shardings want them."""
  sizes = tuple(axes.values())
  devices = np.array(topology(name).devices[: np.prod(sizes)]).reshape(sizes)
  return jax.sharding.Mesh(devices, tuple(axes))


def one_chip(name: str) -> jax.sharding.NamedSharding:
  """The sharding that puts an array on one chip: for `jax.ShapeDtypeStruct(shape, dtype, sharding=...)`."""
  return jax.sharding.NamedSharding(mesh(name, {"chip": 1}), jax.sharding.PartitionSpec())
