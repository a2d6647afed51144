"""Reads files of text as streams of bytes, and decides which are held out for validation.

A corpus consists of two streams, training and validation. A file is in one of them as a whole, depending on a hash of
its name relative to the folder that all files share, so files added below that folder move no others.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import logging
import os
import pathlib
import sysconfig

import numpy as np

from mc_jax.data import files, tokenizers
from mc_jax.data.config import DataConfig
from mc_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The bytes of each split, uint8 [length], with a separator before each file, and its files in order."""

  training: np.ndarray
  validation: np.ndarray
  training_files: tuple[str, ...]
  validation_files: tuple[str, ...]


def load(config: DataConfig) -> Corpus:
  """Reads and splits the corpus.

  Raises:
    ConfigError: There are no files, a file is not text, or a split would be empty.
  """
  texts = stdlib() if config.source == "stdlib" else text(config.paths, config.on_error)
  training, validation = split(sorted(texts), config.validation_fraction, config.seed)
  for name, files_of_split in (("training", training), ("validation", validation)):
    if not any(texts[file] for file in files_of_split):
      raise ConfigError(
        f"the {name} split would be empty: of {len(texts)} file(s), a hash of their names holds out "
        f"data.validation_fraction={config.validation_fraction}. Give data.paths more files, change "
        "data.validation_fraction (between 0 and 1), or try another data.seed"
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
  """(training names, validation names) in the order given; each name's split depends on that name alone."""
  training = [name for name in names if not held_out(name, fraction, seed)]
  validation = [name for name in names if held_out(name, fraction, seed)]
  return training, validation


def held_out(name: str, fraction: float, seed: int) -> bool:
  """Whether the file or document `name` is held out for validation, as the share `fraction` of all names is."""
  digest = hashlib.blake2b(f"{seed}/{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
  return int.from_bytes(digest, "big") < fraction * 2**64


def is_text(data: bytes) -> bool:
  """Whether `data` is UTF-8 without NUL bytes."""
  try:
    data.decode("utf-8")
  except UnicodeDecodeError:
    return False
  return b"\0" not in data


def plain(data: bytes) -> bytes:
  """A file's text without the byte order mark that some editors write."""
  return data.removeprefix(codecs.BOM_UTF8)


def not_text(where: str, data: bytes) -> str:
  """The error message for a file or line that is not text."""
  if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    return f"{where} is UTF-16, not UTF-8: convert it, for example with iconv -f UTF-16 -t UTF-8"
  return f"{where} is not text (UTF-8 without NUL bytes)"


def stdlib_root() -> pathlib.Path:
  """The folder of the running Python's standard library."""
  return pathlib.Path(sysconfig.get_paths()["stdlib"])


def stdlib() -> dict[str, bytes]:
  """The .py files of the running Python's standard library, {relative path: UTF-8 text}.

  Installed packages are excluded, and so are the few files that are deliberately not UTF-8 (tests of the parser).

  Raises:
    ConfigError: This Python ships without its source.
  """
  root = stdlib_root()
  texts = {}
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = [s for s in subfolders if s not in ("site-packages", "dist-packages")]
    for name in names:
      if name.endswith(".py"):
        path = pathlib.Path(folder, name)
        data = plain(path.read_bytes())
        if is_text(data):
          texts[path.relative_to(root).as_posix()] = data
  if not texts:
    raise ConfigError(
      f"data.source=stdlib found no .py file in {root}: this Python ships without its source. "
      "Use data.source=text with data.paths"
    )
  return texts


def text(paths: str, on_error: str = "stop") -> dict[str, bytes]:
  """The files of `paths`, {name: UTF-8 text}.

  Args:
    paths: Files, folders or globs; see files.find, which also names the files.
    on_error: "stop" at a file that is not text, or "skip" it with a warning.

  Raises:
    ConfigError: A pattern matches nothing, or a file cannot be read or is not text; the error names it.
  """
  texts, skipped = {}, 0
  for name, url in files.find(paths).items():
    with files.reading(url) as file:
      data = plain(file.read())
    if is_text(data):
      texts[name] = data
      continue
    message = not_text(url, data)
    if on_error == "stop":
      raise ConfigError(
        f"data.paths: {message}; leave it out, for example with a glob such as 'folder/**/*.txt', or with "
        "data.on_error=skip"
      )
    skipped += 1
    logging.warning("skipped (%d so far): %s", skipped, message)
  return texts
