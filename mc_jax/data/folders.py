"""Local files and folders by glob, as in a shell: links are followed, hidden names skipped."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence

from mc_jax.errors import ConfigError

_MAGIC = "*?["


def glob(pattern: str) -> list[str]:
  """The files and folders that match, absolute, in the order of their names.

  Unlike in the standard library, ** follows links to folders, except to a folder above, and a name with a bracket that
  exists literally matches itself.

  Args:
    pattern: A path in which *, ? and [...] match within a name, and the name ** any number of folders.

  Raises:
    ConfigError: A broken link; the error names it.
    OSError: A folder cannot be read.
  """
  names = [name for name in os.path.join(os.getcwd(), pattern).split("/") if name]
  return list(dict.fromkeys(_glob("/", names)))


def files(folder: str) -> Iterator[str]:
  """The files below a folder, except hidden ones.

  Raises:
    ConfigError: A broken link; the error names it.
    OSError: A folder cannot be read.
  """
  for below in _folders(folder):
    yield from (entry.path for entry in _entries(below) if entry.is_file())


def _glob(folder: str, names: Sequence[str]) -> Iterator[str]:
  if not names:
    yield folder
    return
  pattern, *rest = names
  path = os.path.join(folder, pattern)
  if os.path.lexists(path):
    yield from _glob(_followed(path), rest)
  elif pattern == "**" and os.path.isdir(folder):
    for below in _folders(folder):
      yield from _glob(below, rest)
  elif any(c in pattern for c in _MAGIC) and os.path.isdir(folder):
    for name in sorted(os.listdir(folder)):
      if fnmatch.fnmatchcase(name, pattern) and (pattern.startswith(".") or not name.startswith(".")):
        yield from _glob(_followed(os.path.join(folder, name)), rest)


def _folders(folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
  """A folder and those below it, except links to a folder above."""
  status = os.stat(folder)
  key = (status.st_dev, status.st_ino)
  if key in above:
    return
  yield folder
  for entry in _entries(folder):
    if entry.is_dir():
      yield from _folders(entry.path, (*above, key))


def _entries(folder: str) -> list[os.DirEntry]:
  with os.scandir(folder) as scanned:
    entries = sorted((entry for entry in scanned if not entry.name.startswith(".")), key=lambda entry: entry.name)
  for entry in entries:
    _followed(entry.path)
  return entries


def _followed(path: str) -> str:
  if os.path.islink(path) and not os.path.exists(path):
    raise ConfigError(f"the link {path} leads nowhere (to {os.readlink(path)}): mend or remove it")
  return path
