"""A byte-level BPE learned from a corpus, kept beside the ids that it makes with a note of what it was learned from."""

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
  """Learns the tokenizer.json of a folder, unless it was learned from the same.

  Args:
    source: The corpus.
    vocab_size: Ids to learn.
    most: Bytes of text to learn from, taken from the whole corpus.
    out: The folder, also in a bucket; made if missing.
    on_error: "stop" at a malformed document, or "skip" it.

  Returns:
    The number of ids learned, fewer than `vocab_size` where the text has no more pairs; None if the file was there.

  Raises:
    ConfigError: The folder's tokenizer was learned from something else, each setting named; or there is no text.
  """
  folder = storage.path(out)
  settings = {"train_bpe": vocab_size, "train_bytes": most, "source": source.source, "field": source.field}
  found = list(files.find(source.paths, formats.SUFFIXES[source.source])) if source.paths else []
  settings |= {"paths": source.paths, "files": hashlib.sha256(repr(found).encode()).hexdigest()}
  if (folder / FILE).exists():
    _compare(folder, settings)
    return None
  if (folder / manifests.PLAN).exists():
    raise ConfigError(f"{folder} holds a corpus that was tokenized with --tokenizer. Use another --out")
  folder.mkdir(parents=True, exist_ok=True)
  storage.write(folder / NOTE, json.dumps(settings, indent=1) + "\n")  # first: where a tokenizer is, its note is
  return train(source, vocab_size, most, folder / FILE, on_error)


def train(source: SourceConfig, vocab_size: int, most: int, path: epath.Path, on_error: str = "stop") -> int:
  """Learns a BPE, writes it all or nothing, and returns the number of its ids. See `learn`."""
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
  otherwise = f"Use another --out, or --tokenizer={folder / FILE} to keep that tokenizer"
  try:
    was = json.loads((folder / NOTE).read_bytes())
    differ = [name for name in settings if was[name] != settings[name] and name not in ("paths", "files")]
    same = was["files"] == settings["files"]
    paths = was["paths"]
  except FileNotFoundError:
    raise ConfigError(f"{folder} has a {FILE} without a note of what it was learned from. {otherwise}") from None
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f"{folder / NOTE} is not a note of mc_jax.data.prepare: {error!r}") from error
  lines = [f"--{name} was {was[name]} and is now {settings[name]}" for name in differ]
  if not same and paths != settings["paths"]:
    lines.append(f"--paths was {paths!r} and is now {settings['paths']!r}")
  elif not same:
    lines.append(f"--paths={paths!r} matches other files than then")
  if lines:
    raise ConfigError(f"the {FILE} of {folder} was learned with other settings: {'; '.join(lines)}. {otherwise}")
