"""The documents of a source: any by its number, all in an order that is a function of the seed and the epoch."""

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
_KEPT = 3 * _GROUP  # blocks in memory: shards are not at quite the same place
SKIP = "on_error=skip leaves such documents out"  # what would help against a malformed one
_LARGE = 65_536  # a permutation of more is computed entry by entry


class Documents:
  """Tokenized documents by number.

  A document is its ids between two separators: the first is what the first id is predicted from, the last ends it.

  Args:
    blocks: as of formats.blocks, at least one.
    tokenizer: for text.
    on_error: "stop" at a malformed document, or "skip" it: then it is empty.
  """

  def __init__(self, blocks: Sequence[Block], tokenizer: Tokenizer, on_error: str = "stop"):
    self._blocks = tuple(blocks)
    self._ends = list(itertools.accumulate(block.count for block in blocks))
    self._tokenizer = tokenizer
    self._on_error = on_error
    self._contents: collections.OrderedDict[int, Sequence] = collections.OrderedDict()
    self.skipped: set[int] = set()  # malformed documents met so far
    # Records are found by number, wherever they lie: all can be shuffled.
    self.scattered = all(isinstance(block, (TextRecords, TokenRecords)) for block in blocks)

  def __len__(self) -> int:
    return self._ends[-1]

  @property
  def blocks(self) -> tuple[Block, ...]:
    """Where the documents lie."""
    return self._blocks

  @property
  def counts(self) -> list[int]:
    """Documents of each block."""
    return [block.count for block in self._blocks]

  def name(self, i: int) -> str:
    """What document `i` is called, whatever files come to the corpus."""
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
    """UTF-8 bytes of document `i`, or of what its first `count` ids stand for.

    They are bytes of the source's own text, whatever the tokenizer normalizes or does not know; in folders of ids that
    do not note them, of the decoded text. A character that `count` cuts is not in it; of a text that does not come back
    from its ids, the first `count` have the share that they have of the decoded text.
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
    # Half a character is decoded to U+FFFD, so what both texts begin with ends before it.
    begun = self._tokenizer.decode(ids[:count])
    alike = next((k for k, (a, b) in enumerate(zip(text, begun, strict=False)) if a != b), min(len(text), len(begun)))
    before = len(text[:alike].encode())
    return before if size is None else round(before * size / max(decoded, 1))

  def __getitem__(self, i: int) -> np.ndarray:
    """Document `i`, int32 [ids + 2]; no ids at all if it is empty or skipped.

    Raises:
      ConfigError: a file that cannot be read, or a malformed document where on_error is "stop".
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
  """The ids of each text, int32 [length] without separators, or the error if the tokenizer cannot take it.

  Args:
    tokenizer: The tokenizer.
    texts: The texts, which are encoded together.
    places: Where each text is, for errors.
  """
  try:
    return list(tokenizer.encode(texts))
  except ValueError as error:
    if len(texts) == 1:
      return [Malformed(f"{places[0]}: the tokenizer cannot take this text: {error}")]
    return [encode(tokenizer, [text], [place])[0] for text, place in zip(texts, places, strict=True)]


class Order:
  """Numbers of documents, epoch after epoch without end: entry i is a function of the arguments and i.

  Documents that can be read one by one are shuffled all together. Of others, blocks are shuffled, and the documents of
  a few that follow each other: what is read together is used together.

  Args:
    counts: documents of each block.
    seed: of the order.
    scattered: whether documents can be read one by one.
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
    """(blocks in this epoch's order, the place in it where each group of them ends)."""
    blocks = np.random.default_rng((self._seed, epoch)).permutation(len(self._counts))
    return blocks, np.cumsum(np.add.reduceat(self._counts[blocks], np.arange(0, len(blocks), _GROUP)))

  def _group(self, epoch: int, group: int) -> np.ndarray:
    """Numbers of a group's documents in this epoch's order."""
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
  """64 bits that depend on `key` alone, in every process."""
  return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def chance(*key: int | str) -> float:
  """A number in [0, 1), uniform over keys, a function of the key alone."""
  return hashed(key) / 2**64
