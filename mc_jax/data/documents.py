"""The documents of a source by number, and their order, a function of the seed and the epoch."""

from __future__ import annotations

import bisect
import collections
import functools
import hashlib
import itertools
import logging
from collections.abc import Sequence

import numpy as np
from grain.experimental import index_shuffle

from mc_jax.data.formats import Block, Malformed, TextRecords, TokenRecords
from mc_jax.data.tokenizers import Bytes, Tokenizer
from mc_jax.errors import ConfigError

_GROUP = 4  # blocks whose documents are shuffled together
_KEPT = 3 * _GROUP  # blocks in memory: shards are at slightly different positions
SKIP = "on_error=skip leaves such documents out"  # hint in errors about malformed documents
_LARGE = 65_536  # larger permutations are computed entry by entry


class Documents:
  """Tokenized documents by number.

  A document is its ids between two separators: the first one predicts the first id, the last one is the last target.

  Args:
    blocks: The blocks of formats.blocks, at least one.
    tokenizer: The tokenizer for text.
    on_error: "stop" at a malformed document, or "skip" it, which makes it empty.
  """

  def __init__(self, blocks: Sequence[Block], tokenizer: Tokenizer, on_error: str = "stop"):
    self._blocks = tuple(blocks)
    self._ends = list(itertools.accumulate(block.count for block in blocks))
    self._tokenizer = tokenizer
    self._on_error = on_error
    self._contents: collections.OrderedDict[int, Sequence] = collections.OrderedDict()
    self.skipped: set[int] = set()  # malformed documents so far
    # Records can be read one by one, so all of them can be shuffled together.
    self.scattered = all(isinstance(block, (TextRecords, TokenRecords)) for block in blocks)

  def __len__(self) -> int:
    return self._ends[-1]

  @property
  def blocks(self) -> tuple[Block, ...]:
    """The blocks that hold the documents."""
    return self._blocks

  @property
  def counts(self) -> list[int]:
    """The number of documents in each block."""
    return [block.count for block in self._blocks]

  def name(self, i: int) -> str:
    """The name of document `i`, which does not change when files are added to the corpus."""
    number, within = self._find(i)
    block = self._blocks[number]
    return f"{block.name}/{block.first + within}"

  def text(self, i: int) -> str | None:
    """Document `i` as text; None if it is malformed and skipped."""
    document = self._document(i)
    if isinstance(document, np.ndarray):
      return self._tokenizer.decode(document)
    return document

  def text_bytes(self, i: int, count: int | None = None) -> int:
    """The number of UTF-8 bytes of document `i`, or of the text of its first `count` ids.

    Bytes are those of the source's text, before any normalisation by the tokenizer; for folders of ids without such
    numbers, those of the decoded text. A character cut by `count` is excluded. If ids do not decode to the source's
    text, the first `count` get the share that they have of the decoded text.
    """
    document = self._document(i)
    if isinstance(document, np.ndarray):
      number, within = self._find(i)
      size = self._blocks[number].text_bytes(within)
    else:
      size = len((document or "").encode())
    if count is None and size is not None:
      return size
    if isinstance(self._tokenizer, Bytes):
      return len(document) if count is None else count
    ids = self[i][1:-1]
    text = self._tokenizer.decode(ids)
    decoded = len(text.encode())
    if count is None:
      return decoded
    # An incomplete character decodes to U+FFFD, so the common prefix ends before it.
    start = self._tokenizer.decode(ids[:count])
    common = next((k for k, (a, b) in enumerate(zip(text, start, strict=False)) if a != b), min(len(text), len(start)))
    before = len(text[:common].encode())
    return before if size is None else round(before * size / max(decoded, 1))

  def __getitem__(self, i: int) -> np.ndarray:
    """Document `i` with separators, int32 [ids + 2]; int32 [0] if it is empty or skipped.

    Raises:
      ConfigError: A file that cannot be read, or a malformed document with on_error="stop".
    """
    ids = self._document(i, encoded=True)
    if ids is None or not len(ids):
      return np.zeros(0, np.int32)
    framed = np.empty(len(ids) + 2, np.int32)
    framed[0] = framed[-1] = self._tokenizer.separator
    framed[1:-1] = ids
    return framed

  def _document(self, i: int, encoded: bool = False) -> str | np.ndarray | None:
    number, within = self._find(i)
    block = self._blocks[number]
    try:
      document = block.document(self._content(number), within)
      if not encoded or isinstance(document, np.ndarray):
        return document
      (ids,) = encode(self._tokenizer, [document], [block.place(within)])
      if isinstance(ids, Malformed):
        raise ids
      return ids
    except Malformed as error:
      if self._on_error == "stop":
        raise ConfigError(f"{error}. {SKIP}") from error
      if i not in self.skipped:
        self.skipped.add(i)
        logging.warning("skipped (%d so far): %s", len(self.skipped), error)
      return None

  def _find(self, i: int) -> tuple[int, int]:
    number = bisect.bisect_right(self._ends, i)
    return number, i - (self._ends[number - 1] if number else 0)

  def _content(self, number: int) -> Sequence:
    if number not in self._contents:
      if not self.scattered and len(self._contents) >= _KEPT:
        self._contents.popitem(last=False)
      self._contents[number] = self._blocks[number].read()
    self._contents.move_to_end(number)
    return self._contents[number]

  def __getstate__(self) -> dict:
    return self.__dict__ | {"_contents": collections.OrderedDict()}


def encode(tokenizer: Tokenizer, texts: Sequence[str], places: Sequence[str]) -> list[np.ndarray | Malformed]:
  """The ids of each text, int32 [length] without separators, or the error if the tokenizer fails on it.

  Args:
    tokenizer: The tokenizer.
    texts: The texts, which are encoded together.
    places: Where each text is, for error messages.
  """
  try:
    return list(tokenizer.encode(texts))
  except ValueError as error:
    if len(texts) == 1:
      return [Malformed(f"{places[0]}: the tokenizer cannot take this text: {error}")]
    return [encode(tokenizer, [text], [place])[0] for text, place in zip(texts, places, strict=True)]


class Order:
  """An endless sequence of document numbers, epoch after epoch; entry i is a function of the arguments and i.

  Documents that can be read one by one are shuffled together. Otherwise blocks are shuffled, and then the documents
  within groups of consecutive blocks, so that documents of a block are used close together.

  Args:
    counts: The number of documents in each block.
    seed: The seed of the order.
    scattered: Whether documents can be read one by one.
  """

  def __init__(self, counts: Sequence[int], seed: int, scattered: bool):
    self._counts = np.asarray(counts, np.int64)
    self._starts = np.cumsum(self._counts) - self._counts
    self._size = int(self._counts.sum())
    self._seed = seed
    self._scattered = scattered
    self._groups = functools.lru_cache(maxsize=2)(self._groups)
    self._group = functools.lru_cache(maxsize=8)(self._group)

  def __getitem__(self, i: int) -> int:
    epoch, i = divmod(i, self._size)
    if self._scattered:
      return permuted(i, self._size, (self._seed, epoch))
    _, ends = self._groups(epoch)
    group = int(np.searchsorted(ends, i, side="right"))
    return int(self._group(epoch, group)[i - (ends[group - 1] if group else 0)])

  def _groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(blocks in this epoch's order, the end of each group of them in documents)."""
    blocks = np.random.default_rng((self._seed, epoch)).permutation(len(self._counts))
    return blocks, np.cumsum(np.add.reduceat(self._counts[blocks], np.arange(0, len(blocks), _GROUP)))

  def _group(self, epoch: int, group: int) -> np.ndarray:
    """The numbers of a group's documents in this epoch's order."""
    blocks = self._groups(epoch)[0][group * _GROUP : (group + 1) * _GROUP]
    numbers = np.concatenate([np.arange(self._starts[b], self._starts[b] + self._counts[b]) for b in blocks])
    return np.random.default_rng((self._seed, epoch, group)).permutation(numbers)

  def __reduce__(self):
    return Order, (self._counts, self._seed, self._scattered)


def permuted(i: int, size: int, seed: tuple[int, ...]) -> int:
  """Entry `i` of a permutation of range(size)."""
  if size <= _LARGE:
    return int(_permutation(size, seed)[i])
  return index_shuffle(i, max_index=size - 1, seed=hashed(seed) >> 32, rounds=4)


@functools.lru_cache(maxsize=16)
def _permutation(size: int, seed: tuple[int, ...]) -> np.ndarray:
  return np.random.default_rng(seed).permutation(size)


def hashed(key: object) -> int:
  """A 64-bit hash of `key`, the same in every process."""
  return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def chance(*key: int | str) -> float:
  """A number in [0, 1), uniform over keys and determined by the key."""
  return hashed(key) / 2**64
