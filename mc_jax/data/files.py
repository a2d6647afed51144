"""Finds and opens files by name, folder or glob on any file system of fsspec: local, gs://, s3://, memory://."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import IO

import fsspec
import fsspec.core

from mc_jax import storage
from mc_jax.data import folders
from mc_jax.errors import ConfigError, missing_package

# Errors of disks and networks, which may not recur with the same command.
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENETUNREACH}
_TRANSIENT |= {errno.EHOSTUNREACH, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def find(paths: str, suffixes: Sequence[str] = (), field: str = "data.paths") -> dict[str, str]:
  """The files that a setting names, {name: URL}, sorted by name.

  A file has the name it was found under: links are followed, but keep their own name and suffix.

  Args:
    paths: Files, folders or globs, separated by commas; see `matches`. A folder stands for the files below it that have
      one of the suffixes, except hidden ones.
    suffixes: Suffixes of files in folders; none: all files.
    field: The setting, for errors.

  Returns:
    Names are relative to the files' common folder, so that they stay the same when it is moved.

  Raises:
    ConfigError: A pattern that matches nothing, or a broken link; the error names it.
  """
  urls: set[str] = set()
  for pattern, matched in _patterns(paths, field):
    with _naming(field, pattern):
      below = {url for match in matched for url in _below(match) if url == match or url.endswith(tuple(suffixes) or "")}
    if not below:
      of_kind = f" ({', '.join(suffixes)})" if suffixes else ""
      raise ConfigError(f"{field}: no file{of_kind} matches {pattern!r}: its folders hold none")
    urls |= below
  parents = [url.split("/")[:-1] for url in urls]
  common = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False)))
  return {"/".join(url.split("/")[common:]): url for url in sorted(urls)}


def matches(paths: str) -> list[str]:
  """The files and folders that a setting names, as a shell would expand it: absolute paths or URLs without duplicates.

  Args:
    paths: Paths or globs, separated by commas. ~ is a home folder; * and ** skip hidden names and follow links to
      folders. A path that exists literally is that file, even with a bracket or a comma in its name.

  Raises:
    ConfigError: A pattern that matches nothing, or a broken link; the error names it.
  """
  return list(dict.fromkeys(match for _, matched in _patterns(paths, "data.paths") for match in matched))


def _patterns(paths: str, field: str) -> Iterator[tuple[str, list[str]]]:
  """(pattern, its matches) of a list separated by commas, where a comma may also be part of a name."""
  whole = _local(paths.strip())
  pieces = [paths] if whole and os.path.lexists(whole) else [piece for piece in paths.split(",") if piece.strip()]
  while pieces:
    for count in range(1, 2 if storage.in_bucket(pieces[0]) else len(pieces) + 1):
      pattern = ",".join(pieces[:count]).strip()
      if matched := _matching(pattern, field):
        yield pattern, matched
        pieces = pieces[count:]
        break
    else:
      pattern = pieces[0].strip()
      raise ConfigError(f"{field}: no file matches {pattern!r}{_hint(pattern)}")


def _hint(pattern: str) -> str:
  if storage.in_bucket(pattern) or os.path.isabs(os.path.expanduser(pattern)):
    return ""
  return f"; relative paths are read from {os.getcwd()}: start in the folder they belong to, or give absolute paths"


def _local(url: str) -> str | None:
  """The path of a local file; None for one on another file system."""
  if not storage.in_bucket(url):
    return os.path.expanduser(url)
  scheme, rest = url.split("://", 1)
  return rest if scheme in ("file", "local") else None


def _matching(pattern: str, field: str) -> list[str]:
  with _naming(field, pattern):
    path = _local(pattern)
    if path is not None:
      return [_absolute(match) for match in folders.glob(path)]
    fs, path = fsspec.core.url_to_fs(pattern)
    if fs.exists(path):
      return [fs.unstrip_protocol(path)]
    if not any(c in path for c in "*?["):
      return []
    fixed = re.match(r"[^*?[]*/", path)
    start = fixed.end() if fixed else 0
    shown = [match for match in sorted(fs.glob(path)) if "/." in path[start - 1 :] or not _hidden(match[start:])]
    return [fs.unstrip_protocol(match) for match in shown]


def _below(match: str) -> Iterator[str]:
  """A file, or the files below a folder."""
  if not storage.in_bucket(match):
    yield from folders.files(match) if os.path.isdir(match) else [match]
    return
  fs, path = fsspec.core.url_to_fs(match)
  if fs.isdir(path):
    yield from (fs.unstrip_protocol(file) for file in fs.find(path) if not _hidden(file[len(path) :]))
  else:
    yield match


def _absolute(path: str) -> str:
  """An absolute path without "..": only links before a ".." are resolved, others keep their names."""
  head, up, tail = f"{os.path.join(os.getcwd(), path)}/".rpartition("/../")
  return os.path.normpath(os.path.join(os.path.realpath(head + up), tail) if up else tail)


def _hidden(path: str) -> bool:
  return any(name.startswith(".") for name in path.split("/"))


@contextlib.contextmanager
def reading(url: str, offset: int = 0) -> Iterator[IO[bytes]]:
  """Opens a file of `find`, and decompresses .gz and .zst.

  Raises:
    ConfigError: A file that is missing, truncated or not what its name says; the error names it.
  """
  with _naming("data.paths", url), fsspec.open(url, "rb") if storage.in_bucket(url) else open(url, "rb") as file:
    if url.endswith((".gz", ".zst")):
      pyarrow = pyarrow_module(url)
      codec = "gzip" if url.endswith(".gz") else "zstd"
      with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), codec) as stream:
        yield stream
    else:
      file.seek(offset)
      yield file


def size(url: str) -> int:
  """The size of a file in bytes, as stored."""
  with _naming("data.paths", url):
    if not storage.in_bucket(url):
      return os.path.getsize(url)
    fs, path = fsspec.core.url_to_fs(url)
    return fs.size(path)


def local(url: str) -> str:
  """The path of a local copy, downloaded once; a local file's own path.

  For readers that open only local files. Copies are in the folder $MC_JAX_CACHE, by default ~/.cache/mc_jax.
  """
  if not storage.in_bucket(url):
    return url
  folder = os.environ.get("MC_JAX_CACHE", os.path.expanduser("~/.cache/mc_jax"))
  with _naming("data.paths", url):
    return fsspec.open_local(f"filecache::{url}", filecache={"cache_storage": folder})


def pyarrow_module(where: str):
  """The module pyarrow. Raises ConfigError, naming the file `where` that needs it, if it is not installed."""
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise missing_package(where, "pyarrow", "data") from error
  return pyarrow


@contextlib.contextmanager
def _naming(field: str, what: str) -> Iterator[None]:
  """Turns errors of file systems and decoders into a ConfigError that names the file, or OSError if transient."""
  try:
    yield
  except ConfigError:
    raise
  except OSError as error:
    if error.errno in _TRANSIENT:
      raise OSError(error.errno, f"{field}: cannot read {what}: {os.strerror(error.errno)}") from error
    raise ConfigError(f"{field}: cannot read {what}: {error}") from error
  except (EOFError, ValueError, ImportError) as error:
    raise ConfigError(f"{field}: cannot read {what}: {error}") from error
