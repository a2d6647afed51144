"""The manifest of a tokenized corpus: its tokenizer, its sources and the contents of its files."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
from etils import epath

from mc_jax import storage
from mc_jax.errors import ConfigError

FILE = "manifest.json"
PLAN = "plan.json"  # the blocks of each shard, written before any shard
LENGTHS = np.dtype("<u8")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # a file's name without a folder


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of the corpus, whose records are the ids of documents."""

  file: str  # name in the manifest's folder
  documents: int  # number of documents
  tokens: int  # number of ids
  text_bytes: int  # UTF-8 bytes of the documents' text
  bytes: int  # size of the file
  skipped: int  # malformed documents that were left out
  lengths: str = ""  # name of the file with each document's text_bytes, LENGTHS [documents]; "" in older folders


@dataclasses.dataclass(frozen=True)
class Manifest:
  """A tokenized corpus."""

  tokenizer: str  # the tokenizer's fingerprint, see tokenizers.Tokenizer
  tokenizer_file: str  # name of its copy in the manifest's folder; "" for bytes
  vocab_size: int  # all ids are below it
  dtype: str  # dtype of the ids in a record, "<u2" or "<u4"
  sources: tuple[str, ...]  # names of the files that the documents came from
  shards: tuple[Shard, ...]


def read(folder: str) -> Manifest:
  """The manifest of a folder.

  Raises:
    ConfigError: The manifest is missing or malformed, or names a file outside its folder.
  """
  path = storage.path(folder) / FILE
  try:
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["shards"] = tuple(Shard(**shard) for shard in tree["shards"])
    tree["sources"] = tuple(tree["sources"])
    manifest = Manifest(**tree)
  except OSError as error:
    raise ConfigError(
      f"{folder} has no {FILE}: data.paths must be folders that python -m mc_jax.data.prepare has finished, when the "
      "source is tokens"
    ) from error
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f"{path} is not a manifest of mc_jax.data.prepare: {error!r}") from error
  optional = [manifest.tokenizer_file, *(shard.lengths for shard in manifest.shards)]
  for name in [*(shard.file for shard in manifest.shards), *(name for name in optional if name != "")]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
      raise ConfigError(f"{path} names {name!r}, which is not a plain name of a file beside it")
  if manifest.dtype not in ("<u2", "<u4"):
    raise ConfigError(f"{path} has dtype {manifest.dtype!r}, which must be <u2 or <u4")
  return manifest


def write(folder: epath.Path, manifest: Manifest) -> None:
  """Writes a folder's manifest, atomically."""
  storage.write(folder / FILE, json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def lengths(shard: str) -> str:
  """The name of the file with a shard's text_bytes, in the same folder."""
  return f"{shard.removesuffix('.array_record')}.lengths"


def join(folder: str, name: str) -> str:
  """The URL of a file in a manifest's folder."""
  return str(storage.path(folder) / name)
