"""Learns a byte-level BPE from a corpus and stores it with the tokenized corpus and a note of its training data."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator

from etils import epath

from mc_jax import storage
from mc_jax.data import files, formats, manifests, tokenizers
from mc_jax.data.config import SourceConfig
from mc_jax.data.documents import Documents, Order
from mc_jax.errors import ConfigError

FILE = "tokenizer.json"
NOTE = "tokenizer.settings.json"


def learn(source: SourceConfig, vocab_size: int, most: int, out: str, on_error: str = "stop") -> int | None:
  """Learns the tokenizer.json of a folder, unless the folder already has one learned from the same text.

  Args:
    source: The corpus.
    vocab_size: The number of ids to learn.
    most: The number of bytes of text to learn from, sampled from the whole corpus.
    out: The folder, on this machine or in a bucket; created if missing.
    on_error: "stop" at a malformed document, or "skip" it.

  Returns:
    The number of ids learned, fewer than `vocab_size` if the text has no more pairs; None if the file existed.

  Raises:
    ConfigError: The folder's tokenizer was learned with other settings, which the error lists; or there is no text.
  """
  folder = storage.path(out)
  settings = {"train_bpe": vocab_size, "train_bytes": most, "source": source.source, "field": source.field}
  names = list(files.find(source.paths, formats.SUFFIXES[source.source])) if source.paths else []
  settings |= {"paths": source.paths, "files": hashlib.sha256(repr(names).encode()).hexdigest()}
  if (folder / FILE).exists():
    _compare(folder, settings)
    return None
  if (folder / manifests.PLAN).exists():
    raise ConfigError(f"{folder} holds a corpus that was tokenized with --tokenizer. Use another --out")
  folder.mkdir(parents=True, exist_ok=True)
  # Before the tokenizer, which is refused without its note.
  storage.write(folder / NOTE, json.dumps(settings, indent=1) + "\n")
  return train(source, vocab_size, most, folder / FILE, on_error)


def train(source: SourceConfig, vocab_size: int, most: int, path: epath.Path, on_error: str = "stop") -> int:
  """Learns a BPE, writes it atomically to `path`, and returns the number of its ids. See `learn`."""
  texts = _sample(Documents(formats.blocks(source), tokenizers.Bytes(), on_error), most)
  if (first := next(texts, None)) is None:
    raise ConfigError(f"--train_bpe: the documents of {source.paths!r} hold no text to learn from")
  with tempfile.TemporaryDirectory() as folder:
    temporary = epath.Path(folder) / path.name
    tokenizers.train_bpe(itertools.chain([first], texts), vocab_size, temporary)
    storage.write(path, temporary.read_bytes())
  return tokenizers.load(str(path)).vocab_size


def _sample(documents: Documents, most: int) -> Iterator[str]:
  order = Order(documents.counts, 0, documents.scattered)
  for i in range(len(documents)):
    if most <= 0:
      return
    if text := documents.text(order[i]):
      most -= len(text.encode())
      yield text


def _compare(folder: epath.Path, settings: dict) -> None:
  """Raises ConfigError, naming each difference, unless the folder's tokenizer was learned with these settings."""
  remedy = f"Use another --out, or --tokenizer={folder / FILE} to keep that tokenizer"
  try:
    then = json.loads((folder / NOTE).read_bytes())
    changed = [name for name in settings if then[name] != settings[name] and name not in ("paths", "files")]
    same_files = then["files"] == settings["files"]
    paths = then["paths"]
  except FileNotFoundError:
    raise ConfigError(f"{folder} has a {FILE} without a note of what it was learned from. {remedy}") from None
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f"{folder / NOTE} is not a note of mc_jax.data.prepare: {error!r}") from error
  lines = [f"--{name} was {then[name]} and is now {settings[name]}" for name in changed]
  if not same_files and paths != settings["paths"]:
    lines.append(f"--paths was {paths!r} and is now {settings['paths']!r}")
  elif not same_files:
    lines.append(f"--paths={paths!r} now matches other files")
  if lines:
    raise ConfigError(f"the {FILE} of {folder} was learned with other settings: {'; '.join(lines)}. {remedy}")
