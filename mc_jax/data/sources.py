"""Where text comes from, and which files are held out for validation.

A corpus is two streams of bytes, training and validation. Files are split whole: a file is in one
of them, decided by a hash of its name below the folder that all files share: files added below it move no others.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
import pathlib
import sysconfig

import numpy as np

from mc_jax.data import tokenizers
from mc_jax.data.config import DataConfig
from mc_jax.data.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Tokens uint8 [length] of each split: its files in order, a separator before each."""

  training: np.ndarray
  validation: np.ndarray
  training_files: tuple[str, ...]
  validation_files: tuple[str, ...]


def load(config: DataConfig) -> Corpus:
  """Reads and splits the corpus.

  Raises:
    ConfigError: nothing found, a file that is not text, or a split that would be empty.
  """
  texts = stdlib() if config.source == "stdlib" else text(config.paths)
  training, validation = split(sorted(texts), config.validation_fraction, config.seed)
  for name, files in (("training", training), ("validation", validation)):
    if not any(texts[file] for file in files):
      raise ConfigError(
        f"the {name} split would be empty: {len(texts)} file(s) found, of which a hash holds out "
        f"data.validation_fraction={config.validation_fraction} by name. Give data.paths more "
        "files, change data.validation_fraction (between 0 and 1), or try another data.seed"
      )
  return Corpus(
    training=_join(texts[file] for file in training),
    validation=_join(texts[file] for file in validation),
    training_files=tuple(training),
    validation_files=tuple(validation),
  )


def _join(texts) -> np.ndarray:
  separator = bytes([tokenizers.SEPARATOR])
  return tokenizers.encode(b"".join(separator + text for text in texts))


def split(names: list[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
  """Training and validation names, in the order given; each name's place depends on it alone."""
  training = [name for name in names if not held_out(name, fraction, seed)]
  validation = [name for name in names if held_out(name, fraction, seed)]
  return training, validation


def held_out(name: str, fraction: float, seed: int) -> bool:
  """Whether what is called so is for validation: `fraction` of all names are."""
  digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big") < fraction * 2**64


def is_text(data: bytes) -> bool:
  """Whether `data` is UTF-8 and holds no NUL byte, as no text does."""
  try:
    data.decode("utf-8")
  except UnicodeDecodeError:
    return False
  return b"\0" not in data


def stdlib_root() -> pathlib.Path:
  """The folder of the standard library of the Python that runs this."""
  return pathlib.Path(sysconfig.get_paths()["stdlib"])


def stdlib() -> dict[str, bytes]:
  """The .py files of the standard library of the Python that runs this, by relative path.

  Installed packages are left out, and so are the few files that are not UTF-8 on purpose (tests
  of the parser).
  """
  root = stdlib_root()
  files = {}
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = [s for s in subfolders if s not in ("site-packages", "dist-packages")]
    for name in names:
      if name.endswith(".py"):
        path = pathlib.Path(folder, name)
        data = path.read_bytes()
        if is_text(data):
          files[path.relative_to(root).as_posix()] = data
  if not files:
    raise ConfigError(
      f"data.source=stdlib found no .py file in {root}: this Python ships without its source. "
      "Use data.source=text with data.paths"
    )
  return files


def text(paths: str) -> dict[str, bytes]:
  """The files named by `paths` (files, folders, globs; separated by commas), by path.

  A folder stands for every file below it, hidden ones left out. Names are relative to the folder
  that all the files have in common, so that the split survives moving it.

  Raises:
    ConfigError: naming the glob that matches nothing, or the file that is not text.
  """
  found: set[pathlib.Path] = set()
  for pattern in filter(None, (part.strip() for part in paths.split(","))):
    matches = glob.glob(os.path.expanduser(pattern), recursive=True)
    files = [file for match in matches for file in _files(pathlib.Path(match))]
    if not files:
      raise ConfigError(f"data.paths: no file matches {pattern!r} (from {os.getcwd()})")
    found.update(file.resolve() for file in files)
  root = pathlib.Path(os.path.commonpath([file.parent for file in found]))
  texts = {}
  for file in sorted(found):
    try:
      data = file.read_bytes()
    except OSError as error:
      raise ConfigError(f"data.paths: cannot read {file}: {error.strerror}") from error
    if not is_text(data):
      raise ConfigError(
        f"data.paths: {file} is not text (UTF-8 without NUL bytes); "
        "leave it out, for example with a glob such as 'folder/**/*.txt'"
      )
    texts[file.relative_to(root).as_posix()] = data
  return texts


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  if path.is_file():
    return [path]
  return [
    file
    for file in path.rglob("*")
    if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
  ]
