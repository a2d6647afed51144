"""What a run writes besides checkpoints: appended to in a local folder, and sent whole to a bucket if it is for one."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import tempfile
from collections.abc import Iterator

import jax
from etils import epath

from mc_jax import storage
from mc_jax.data import lock
from mc_jax.errors import ConfigError, missing_package
from mc_jax.training import distributed, profiling


def workdir(text: str) -> epath.Path:
  """A run's folder, DIR on this machine or gs://BUCKET/DIR, as a user typed it.

  Raises:
    ConfigError: another scheme, a bucket without what it needs, or a file where a folder should be.
  """
  scheme, found, _ = text.partition("://")
  if found and scheme != "gs":
    raise ConfigError(f"--workdir must be a folder of this machine or gs://BUCKET/FOLDER, got {text}")
  if found and importlib.util.find_spec("gcsfs") is None:
    raise missing_package(f"--workdir={text}", "gcsfs", "gcs")
  path = storage.path(text)
  if not found:
    try:
      str(path).encode()
    except UnicodeError as error:
      raise ConfigError(
        f"--workdir={text!a} is not UTF-8, as checkpoints need it. If it was typed as UTF-8, set PYTHONUTF8=1"
      ) from error
    if file := next((part for part in (path, *path.parents) if part.is_file()), None):
      raise ConfigError(f"--workdir={text} must be a folder, and {file} is a file")
  return path


@contextlib.contextmanager
def occupied(workdir: epath.Path) -> Iterator[None]:
  """Within it no other run has the workdir; all processes of a job enter it together, and the first holds the lock.

  Raises:
    OSError: Another run has it, or it cannot be written; in all processes.
  """
  with contextlib.ExitStack() as stack:
    problem = ""
    if distributed.is_first():
      try:
        stack.enter_context(lock.take(workdir, "trains in", "use another --workdir"))
      except OSError as error:
        problem = str(error)
    if problem := distributed.from_first(problem):
      raise OSError(problem)
    yield


class Outputs:
  """Files of a run.

  Attributes:
    folder: to write them in. The workdir itself, if it is a folder of this machine and this is the job's first
      process. Else a temporary one: nothing can be appended to in a bucket, and only one process may write. Of the
      other processes' files only traces are kept, by the process's number.
  """

  def __init__(self, workdir: epath.Path, folder: pathlib.Path):
    self.folder = folder
    self._workdir = workdir
    self._sent: dict[pathlib.Path, tuple[int, int]] = {}

  def fetch(self, name: str) -> None:
    """Gets a file that is to be gone on with, if it is there."""
    if self._staged and distributed.is_first() and (self._workdir / name).exists():
      (self.folder / name).write_bytes((self._workdir / name).read_bytes())

  def send(self) -> None:
    """Sends what is new or has changed; without effect if it is in its place already."""
    if not self._staged:
      return
    first = distributed.is_first()
    kept = self.folder if first else self.folder / profiling.FOLDER
    for path in sorted(path for path in kept.rglob("*") if path.is_file()):
      stat = path.stat()
      version = (stat.st_mtime_ns, stat.st_size)
      if self._sent.get(path) != version:
        # Traces have the names of their hosts, on which more than one process may run.
        name = path.name if first else f"process_{jax.process_index()}_{path.name}"
        target = self._workdir / path.relative_to(self.folder).with_name(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        self._sent[path] = version

  @property
  def _staged(self) -> bool:
    """Whether what is in `folder` is to go elsewhere."""
    return str(self.folder) != str(self._workdir)


@contextlib.contextmanager
def outputs(workdir: epath.Path) -> Iterator[Outputs]:
  """The outputs of a run, which are sent a last time at its end, whatever ended it."""
  if distributed.is_first() and not storage.in_bucket(workdir):
    yield Outputs(workdir, pathlib.Path(workdir))
    return
  with tempfile.TemporaryDirectory(prefix="mc_jax_") as folder:
    staged = Outputs(workdir, pathlib.Path(folder))
    try:
      yield staged
    finally:
      staged.send()
