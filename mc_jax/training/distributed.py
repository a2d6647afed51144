"""Several processes as one job: they find each other, read the same, and stop together."""

from __future__ import annotations

import os
import sys
import zlib
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from mc_jax.errors import ConfigError


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_timeout_seconds: int = 30,
) -> None:
  """Joins the job's other processes, if there are any; before anything asks JAX for a device.

  On Cloud TPU, GKE, Slurm and Open MPI, JAX finds in the environment what is not given here. Where it finds nothing,
  and nothing is given, the process is a job of its own.

  Args:
    coordinator: HOST:PORT on which process 0 listens.
    num_processes: of the job; 1 joins nobody, whatever the environment says.
    process_id: of this process, from 0.
    heartbeat_timeout_seconds: after which a process that is silent is taken for dead, which ends the others.

  Raises:
    ConfigError: values that cannot be.
  """
  if num_processes == 1:
    return
  given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
  if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
    raise ConfigError(f"--coordinator must be HOST:PORT, such as localhost:8476, got {coordinator}")
  if num_processes is not None and process_id is not None and process_id >= num_processes:
    raise ConfigError(f"--process_id={process_id} must be below --num_processes={num_processes}: they count from 0")
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      heartbeat_timeout_seconds=heartbeat_timeout_seconds,
      shutdown_timeout_seconds=heartbeat_timeout_seconds,
    )
  except ValueError as error:  # JAX found nothing in the environment
    if named := [name for name, value in given.items() if value is not None]:
      missing = ", ".join(name for name, value in given.items() if value is None)
      raise ConfigError(
        f"{', '.join(named)} without {missing}, which the environment does not tell: {error}"
      ) from error


def is_first() -> bool:
  """Whether this is the process that prints and writes for all."""
  return jax.process_index() == 0


def from_first(text: str) -> str:
  """The text that the first process gives, at most 1,024 bytes of it, in every process; a collective."""
  if jax.process_count() == 1:
    return text
  padded = np.zeros(1024, np.uint8)
  data = np.frombuffer(text.encode("utf-8", "backslashreplace")[:1024], np.uint8)
  padded[: len(data)] = data
  return bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0").decode("utf-8", "replace")


def leave(error: jax.errors.JaxRuntimeError) -> NoReturn:
  """Ends a process whose computation failed, at once: an orderly end would wait for the others, which may be gone."""
  if jax.process_count() == 1:
    raise error
  again = "If another process has ended, that is why; the same command, given to all, goes on from the last checkpoint"
  print(f"error: process {jax.process_index()} of {jax.process_count()}: {error}\n{again}", file=sys.stderr, flush=True)
  os._exit(1)


def require_equal(what: str, *data: bytes | np.ndarray) -> None:
  """Raises ConfigError, in every process, unless all have the same data; a collective."""
  if jax.process_count() == 1:
    return
  checksum = 0
  for part in data:
    checksum = zlib.crc32(part, checksum)
  checksums = np.ravel(multihost_utils.process_allgather(np.uint32(checksum)))
  if (checksums != checksums[0]).any():
    others = ", ".join(str(i) for i in np.flatnonzero(checksums != checksums[0]))
    raise ConfigError(f"{what} are not the same in all processes: process {others} differ(s) from process 0")
