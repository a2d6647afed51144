"""Tokenizers: bytes, a Hugging Face tokenizer.json, or a SentencePiece model."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from mc_jax import storage
from mc_jax.errors import ConfigError, missing_package

VOCAB_SIZE = 256
SEPARATOR = 0  # the byte before every file; it cannot occur in one (see formats.is_text)

# Tokens that vocabularies use for the end of a text or, failing that, for its start.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]", "<s>", "<bos>", "[BOS]")


def encode(text: str | bytes) -> np.ndarray:
  """The bytes of a text, uint8 [length]; a string as UTF-8."""
  data = text.encode("utf-8") if isinstance(text, str) else text
  return np.frombuffer(data, dtype=np.uint8)


def decode(tokens: np.ndarray) -> str:
  """The text of bytes [length]; separators become newlines, and invalid UTF-8 becomes U+FFFD."""
  data = np.asarray(tokens, dtype=np.uint8).tobytes()
  return data.replace(bytes([SEPARATOR]), b"\n").decode("utf-8", errors="replace")


class Tokenizer(Protocol):
  """Converts text to ids and back.

  Attributes:
    vocab_size: All ids are below it.
    separator: The id at the start and at the end of a document.
    fingerprint: A digest of everything that ids depend on: equal fingerprints mean equal ids.
  """

  vocab_size: int
  separator: int
  fingerprint: str

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text, int32 [length], without separators.

    Raises:
      ValueError: The tokenizer fails on one of the texts.
    """

  def decode(self, ids: np.ndarray) -> str:
    """The text of ids [length]; separators become newlines."""


class Bytes:
  """Every byte of the UTF-8 encoding is a token."""

  vocab_size = VOCAB_SIZE
  separator = SEPARATOR
  fingerprint = "bytes"

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [encode(text).astype(np.int32) for text in texts]

  def decode(self, ids: np.ndarray) -> str:
    return decode(ids)


class HuggingFace:
  """The tokenizer of a tokenizer.json."""

  def __init__(self, data: bytes, separator: str, where: str):
    tokenizers = _import("tokenizers", where)
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the package has no exception class of its own
      raise ConfigError(f"data.tokenizer: {where} is not a tokenizer.json of Hugging Face: {error}") from error
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    self._tokenizer.encode_special_tokens = True  # a text that spells a special token is still text
    self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    self.separator = _separator(self._tokenizer.token_to_id, separator, where)
    self.fingerprint = _fingerprint(data, self.separator)

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    with _refusing():
      encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

  def decode(self, ids: np.ndarray) -> str:
    decode = functools.partial(self._tokenizer.decode, skip_special_tokens=False)
    return "\n".join(decode(part.tolist()) for part in _parts(ids, self.separator))


class SentencePiece:
  """The tokenizer of a SentencePiece *.model."""

  def __init__(self, data: bytes, separator: str, where: str):
    sentencepiece = _import("sentencepiece", where)
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    except Exception as error:
      raise ConfigError(f"data.tokenizer: {where} is not a SentencePiece model: {error}") from error
    processor = self._processor
    self.vocab_size = processor.vocab_size()

    def to_id(piece: str) -> int | None:
      number = processor.piece_to_id(piece)
      return number if processor.id_to_piece(number) == piece else None

    self.separator = _separator(to_id, separator, where)
    self.fingerprint = _fingerprint(data, self.separator)

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    with _refusing():
      return [np.asarray(ids, np.int32) for ids in self._processor.encode(list(texts))]

  def decode(self, ids: np.ndarray) -> str:
    return "\n".join(self._processor.decode(part.tolist()) for part in _parts(ids, self.separator))


def load(name: str, separator: str = "") -> Tokenizer:
  """The tokenizer of `data.tokenizer`.

  Args:
    name: "bytes", or the path of a tokenizer.json or a SentencePiece *.model, on this machine or in a bucket.
    separator: The token at the start and end of documents; "": the first of the usual ones in the vocabulary.

  Raises:
    ConfigError: The file cannot be read or is not a tokenizer, or the vocabulary has no such separator.
  """
  if name == "bytes":
    if separator:
      raise ConfigError(f"data.separator must be empty with data.tokenizer=bytes, got {separator!r}")
    return Bytes()
  data = read(name)
  return (SentencePiece if name.endswith(".model") else HuggingFace)(data, separator, name)


def read(name: str) -> bytes:
  """The bytes of a tokenizer's file. Raises ConfigError if it cannot be read."""
  try:
    return storage.path(name).read_bytes()
  except OSError as error:
    raise ConfigError(
      f"data.tokenizer must be bytes, a tokenizer.json or a SentencePiece *.model; cannot read {name!r}: {error}"
    ) from error


def train_bpe(texts, vocab_size: int, path: pathlib.Path) -> None:
  """Learns a byte-level BPE of up to `vocab_size` ids from an iterable of texts, and writes it to `path` as JSON.

  The separator is <|endoftext|>, id 0. Every text can be encoded, and decodes to itself.
  """
  tokenizers = _import("tokenizers", "--train_bpe")
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[_SEPARATORS[0]],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.save(str(path))


def _import(package: str, where: str):
  try:
    return __import__(package)
  except ImportError as error:
    raise missing_package(where, package, "data") from error


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
  """Turns any error of a package into ValueError, even a panic in Rust, which is not an Exception."""
  try:
    yield
  except BaseException as error:
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
      raise ValueError(str(error)) from error
    raise


def _separator(to_id, token: str, where: str) -> int:
  """The id of the separator; with token="", that of the first usual one. Raises ConfigError if there is none."""
  candidates = [to_id(candidate) for candidate in ([token] if token else _SEPARATORS)]
  ids = [number for number in candidates if number is not None]
  if not ids:
    missing = repr(token) if token else f"none of {', '.join(_SEPARATORS)}"
    raise ConfigError(
      f"data.separator must be a token of {where}, which has " + (f"no {missing}" if token else missing)
    )
  return ids[0]


def _fingerprint(data: bytes, separator: int) -> str:
  return f"{hashlib.sha256(data).hexdigest()}/{separator}"


def _parts(ids: np.ndarray, separator: int) -> list[np.ndarray]:
  """The ids between separators, int [length] each."""
  ids = np.asarray(ids)
  cuts = np.flatnonzero(ids == separator)
  return [part[part != separator] for part in np.split(ids, cuts)]
