"""Local folders as a shell sees them: links are followed, hidden names left out."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence

from mc_jax.errors import ConfigError

_MAGIC = "*?["


def glob(pattern: str) -> list[str]:
  """The files and folders that match, absolute, in the order of their names.

  Unlike the standard library's, ** follows links to folders and ends where a link leads back to a folder above it, and
  a part with a bracket that exists as it is written stands for itself.

  Args:
    pattern: A path; *, ? and [...] match within a name, the part ** any number of folders.

  Raises:
    ConfigError: Naming a link that leads nowhere.
    OSError: A folder cannot be read.
  """
  parts = [part for part in os.path.join(os.getcwd(), pattern).split("/") if part]
  return list(dict.fromkeys(_glob("/", parts)))


def files(folder: str) -> Iterator[str]:
  """The files below a folder, without hidden ones.

  Raises:
    ConfigError: Naming a link that leads nowhere.
    OSError: A folder cannot be read.
  """
  for below in _folders(folder):
    yield from (entry.path for entry in _entries(below) if entry.is_file())


def _glob(folder: str, parts: Sequence[str]) -> Iterator[str]:
  if not parts:
    yield folder
    return
  part, *rest = parts
  path = os.path.join(folder, part)
  if os.path.lexists(path):
    yield from _glob(_followed(path), rest)
  elif part == "**" and os.path.isdir(folder):
    for below in _folders(folder):
      yield from _glob(below, rest)
  elif any(c in part for c in _MAGIC) and os.path.isdir(folder):
    for name in sorted(os.listdir(folder)):
      if fnmatch.fnmatchcase(name, part) and (part.startswith(".") or not name.startswith(".")):
        yield from _glob(_followed(os.path.join(folder, name)), rest)


def _folders(folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
  """A folder and those below it; a link to a folder above itself is left out."""
  status = os.stat(folder)
  key = (status.st_dev, status.st_ino)
  if key in above:
    return
  yield folder
  for entry in _entries(folder):
    if entry.is_dir():
      yield from _folders(entry.path, (*above, key))


def _entries(folder: str) -> list[os.DirEntry]:
  with os.scandir(folder) as found:
    entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
  for entry in entries:
    _followed(entry.path)
  return entries


def _followed(path: str) -> str:
  if os.path.islink(path) and not os.path.exists(path):
    raise ConfigError(f"the link {path} leads nowhere (to {os.readlink(path)}): mend or remove it")
  return path
