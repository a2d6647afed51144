"""The files of a run besides checkpoints, which are written to a local folder and copied to a bucket if need be."""

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
  """A run's folder from the user's text, DIR on this machine or gs://BUCKET/DIR.

  Raises:
    ConfigError: Another scheme, a bucket without the package gcsfs, or a file where a folder should be.
  """
  scheme, in_bucket, _ = text.partition("://")
  if in_bucket and scheme != "gs":
    raise ConfigError(f"--workdir must be a folder of this machine or gs://BUCKET/FOLDER, got {text}")
  if in_bucket and importlib.util.find_spec("gcsfs") is None:
    raise missing_package(f"--workdir={text}", "gcsfs", "gcs")
  path = storage.path(text)
  if not in_bucket:
    try:
      str(path).encode()
    except UnicodeError as error:
      raise ConfigError(
        f"--workdir={text!a} is not UTF-8, which checkpoints require. If it was typed as UTF-8, set PYTHONUTF8=1"
      ) from error
    if file := next((part for part in (path, *path.parents) if part.is_file()), None):
      raise ConfigError(f"--workdir={text} must be a folder, and {file} is a file")
  return path


@contextlib.contextmanager
def occupied(workdir: epath.Path) -> Iterator[None]:
  """Keeps other runs out of the workdir. All processes of a job enter it together; the first holds the lock.

  Raises:
    OSError: In all processes: another run uses the workdir, or it cannot be written.
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
  """The files of a run.

  Attributes:
    folder: The folder to write them in. It is the workdir if that is on this machine and this is the job's first
      process. Otherwise it is a temporary one, because nothing can be appended to in a bucket and only one process may
      write. Of the other processes' files only traces are kept, under the process's index.
  """

  def __init__(self, workdir: epath.Path, folder: pathlib.Path):
    self.folder = folder
    self._workdir = workdir
    self._sent: dict[pathlib.Path, tuple[int, int]] = {}

  def fetch(self, name: str) -> None:
    """Copies a file from the workdir, to append to it, if it exists."""
    if self._staged and distributed.is_first() and (self._workdir / name).exists():
      (self.folder / name).write_bytes((self._workdir / name).read_bytes())

  def send(self) -> None:
    """Copies new and changed files to the workdir, unless `folder` is the workdir."""
    if not self._staged:
      return
    first = distributed.is_first()
    source = self.folder if first else self.folder / profiling.FOLDER
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
      stat = path.stat()
      version = (stat.st_mtime_ns, stat.st_size)
      if self._sent.get(path) != version:
        # Traces are named after their hosts, on which several processes may run.
        name = path.name if first else f"process_{jax.process_index()}_{path.name}"
        target = self._workdir / path.relative_to(self.folder).with_name(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        self._sent[path] = version

  @property
  def _staged(self) -> bool:
    """Whether `folder` is not the workdir."""
    return str(self.folder) != str(self._workdir)


@contextlib.contextmanager
def outputs(workdir: epath.Path) -> Iterator[Outputs]:
  """The outputs of a run, which are sent once more at its end, whatever ended it."""
  if distributed.is_first() and not storage.in_bucket(workdir):
    yield Outputs(workdir, pathlib.Path(workdir))
    return
  with tempfile.TemporaryDirectory(prefix="mc_jax_") as folder:
    staged = Outputs(workdir, pathlib.Path(folder))
    try:
      yield staged
    finally:
      staged.send()
