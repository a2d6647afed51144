"""Files by name, folder or glob, on any file system that fsspec opens: local ones, gs://, s3://, memory://."""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Iterator, Sequence
from typing import IO

import fsspec
import fsspec.core
from etils import epath

from mc_jax.data.errors import ConfigError, missing_package


def path(text: str) -> epath.Path:
  """The file or folder that a user wrote: ~ and ~NAME are home folders, gs:// and other schemes stay as they are."""
  return epath.Path(text) if "://" in text else epath.Path(os.path.expanduser(text))


def find(paths: str, suffixes: Sequence[str] = (), field: str = "data.paths") -> dict[str, str]:
  """The files named by `paths`, {name: URL}, sorted by name.

  Args:
    paths: files, folders or globs (** included), separated by commas. A folder stands for the files below it that have
      one of the suffixes, hidden ones left out.
    suffixes: of files in folders; none: all of them.
    field: the setting, for errors.

  Returns:
    Names are relative to the folder that all the files have in common, so that they survive moving it.

  Raises:
    ConfigError: naming the part that matches nothing.
  """
  urls: set[str] = set()
  for pattern in filter(None, (part.strip() for part in paths.split(","))):
    with _naming(field, pattern):
      fs, path = fsspec.core.url_to_fs(os.path.expanduser(pattern))
      matches = sorted(fs.glob(path)) if any(c in path for c in "*?[") else [path] if fs.exists(path) else []
      found = [file for match in matches for file in _files(fs, match, suffixes)]
      if not found:
        of_kind = f" ({', '.join(suffixes)})" if suffixes else ""
        raise ConfigError(f"{field}: no file{of_kind} matches {pattern!r} (from {os.getcwd()})")
      local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
      urls.update(os.path.realpath(file) if local else fs.unstrip_protocol(file) for file in found)
  root = os.path.commonpath([posixpath.dirname(url) for url in urls]) if len(urls) > 1 else posixpath.dirname(*urls)
  return {url[len(root) :].lstrip("/"): url for url in sorted(urls)}


def _files(fs, path: str, suffixes: Sequence[str]) -> list[str]:
  if not fs.isdir(path):
    return [path]
  return [
    file
    for file in fs.find(path)
    if not any(part.startswith(".") for part in file[len(path) :].split("/")) and file.endswith(tuple(suffixes) or "")
  ]


@contextlib.contextmanager
def reading(url: str, offset: int = 0) -> Iterator[IO[bytes]]:
  """Opens a file of `find`; what is .gz or .zst is decompressed.

  Raises:
    ConfigError: naming the file that is missing, torn or not what its name says.
  """
  with _naming("data.paths", url), fsspec.open(url, "rb") as file:
    if url.endswith((".gz", ".zst")):
      pyarrow = pyarrow_module(url)
      codec = "gzip" if url.endswith(".gz") else "zstd"
      with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), codec) as stream:
        yield stream
    else:
      file.seek(offset)
      yield file


def size(url: str) -> int:
  """Bytes of a file, compressed as it lies there."""
  with _naming("data.paths", url):
    fs, path = fsspec.core.url_to_fs(url)
    return fs.size(path)


def local(url: str) -> str:
  """A path of a copy on this machine's file system, made once; the file itself where it lies there.

  For readers that open nothing else. Copies are in the folder MC_JAX_CACHE names, else in ~/.cache/mc_jax.
  """
  if "://" not in url:
    return url
  folder = os.environ.get("MC_JAX_CACHE", os.path.expanduser("~/.cache/mc_jax"))
  with _naming("data.paths", url):
    return fsspec.open_local(f"filecache::{url}", filecache={"cache_storage": folder})


def pyarrow_module(where: str):
  """pyarrow, with an error that says what asks for it."""
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise missing_package(where, "pyarrow", "data") from error
  return pyarrow


@contextlib.contextmanager
def _naming(field: str, what: str) -> Iterator[None]:
  """What file systems and decoders raise becomes a ConfigError that names the file."""
  try:
    yield
  except ConfigError:
    raise
  except (OSError, EOFError, ValueError, ImportError) as error:
    raise ConfigError(f"{field}: cannot read {what}: {error}") from error
