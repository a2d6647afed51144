"""Several processes as one job: they find each other, check that they read the same, and stop together."""

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
  """Joins the job's other processes, if there are any. Must be called before JAX is asked for devices.

  On Cloud TPU, GKE, Slurm and Open MPI, JAX finds missing values in the environment. If it finds nothing, and nothing
  is given, the process is a job of its own.

  Args:
    coordinator: HOST:PORT on which process 0 listens.
    num_processes: The number of processes in the job; 1 ignores the environment.
    process_id: The index of this process, from 0.
    heartbeat_timeout_seconds: Time after which a silent process counts as dead and the others end.

  Raises:
    ConfigError: Values that are invalid or incomplete.
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
        f"{', '.join(named)} without {missing}, which the environment does not provide: {error}"
      ) from error


def is_first() -> bool:
  """Whether this is the process that prints and writes files for the job."""
  return jax.process_index() == 0


def from_first(text: str) -> str:
  """The first process's text, at most 1,024 bytes of it, in every process; a collective."""
  if jax.process_count() == 1:
    return text
  padded = np.zeros(1024, np.uint8)
  data = np.frombuffer(text.encode("utf-8", "backslashreplace")[:1024], np.uint8)
  padded[: len(data)] = data
  return bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0").decode("utf-8", "replace")


def leave(error: jax.errors.JaxRuntimeError) -> NoReturn:
  """Ends a process whose computation failed, at once: an orderly exit would wait for others that may be gone."""
  if jax.process_count() == 1:
    raise error
  again = "If another process has ended, that is why; the same command, given to all, resumes from the last checkpoint"
  print(f"error: process {jax.process_index()} of {jax.process_count()}: {error}\n{again}", file=sys.stderr, flush=True)
  os._exit(1)


def require_equal(what: str, *data: bytes | np.ndarray) -> None:
  """Raises ConfigError in every process unless all have the same data; a collective."""
  if jax.process_count() == 1:
    return
  checksum = 0
  for item in data:
    checksum = zlib.crc32(item, checksum)
  checksums = np.ravel(multihost_utils.process_allgather(np.uint32(checksum)))
  if (checksums != checksums[0]).any():
    others = ", ".join(str(i) for i in np.flatnonzero(checksums != checksums[0]))
    raise ConfigError(f"{what} are not the same in all processes: process {others} differ(s) from process 0")
