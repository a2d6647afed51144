"""Text from tokens that arrive a few at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from mc_jax.data.tokenizers import Tokenizer


def known(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  """The ids [tokens] that the tokenizer has; a model with a larger vocabulary may generate others."""
  return ids[(ids >= 0) & (ids < tokenizer.vocab_size)]


def stops(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
  """Sequences of ids that end a continuation on the device: `texts` in the tokenizer's ids, and a document's end.

  Other ids may spell the same texts: `Stream` finds those.
  """
  spelled = (tuple(ids.tolist()) for ids in tokenizer.encode(list(texts))) if texts else ()
  return (*(ids for ids in spelled if ids), (tokenizer.separator,))


class Stream:
  """Text that later tokens cannot change: no incomplete characters, and nothing that may become a stop text.

  Args:
    decode: Turns ids [tokens] into text.
    stop: Texts at which the text ends.
  """

  def __init__(self, decode: Callable[[np.ndarray], str], stop: Sequence[str] = ()):
    self._decode = decode
    self._stop = tuple(text for text in stop if text)
    self._ids: list[int] = []
    self._shown = 0  # characters returned so far
    self.ended = False

  def add(self, ids: np.ndarray) -> str:
    """Adds tokens, and returns the text that they add."""
    self._ids += ids.tolist()
    return self._new(self._settled())

  def rest(self) -> str:
    """The remaining text when no more tokens arrive."""
    return self._new(self._cut()[0])

  def text(self) -> str:
    """The text returned so far."""
    return self._cut()[0][: self._shown]

  def _new(self, text: str) -> str:
    new, self._shown = text[self._shown :], max(self._shown, len(text))
    return new

  def _cut(self) -> tuple[str, bool]:
    """The text up to the first stop, and whether there is one."""
    text = self._decode(np.array(self._ids, np.int32)) if self._ids else ""
    ends = [place for stop in self._stop if (place := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)

  def _settled(self) -> str:
    text, self.ended = self._cut()
    if self.ended:
      return text
    text = text.rstrip("\ufffd")
    longest = max((len(stop) for stop in self._stop), default=1)
    for start in range(max(len(text) - longest + 1, 0), len(text)):
      if any(stop.startswith(text[start:]) for stop in self._stop):
        return text[:start]
    return text


def follow(
  blocks: Iterable[np.ndarray], streams: Sequence[Stream], tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, list[str]]]:
  """Reads continuations until all have ended, also by stop texts in other ids than the tokenizer's.

  Args:
    blocks: Blocks of tokens of all continuations, int32 [rows, up to block], see Decoder.generate.
    streams: The streams of the first rows; other rows only fill the batch.
    tokenizer: The tokenizer.

  Yields:
    A block, and the text it adds to each stream.
  """
  for block in blocks:
    rows = zip(streams, block, strict=False)
    added = [
      "" if stream.ended else stream.add(known(ids[ids != tokenizer.separator], tokenizer)) for stream, ids in rows
    ]
    yield block, added
    if all(stream.ended for stream in streams):
      return
