"""Text from tokens that come a few at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from mc_jax.data.tokenizers import Tokenizer


def known(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  """The ids [tokens] that the tokenizer has; a model with a larger vocabulary may write others, which are no text."""
  return ids[(ids >= 0) & (ids < tokenizer.vocab_size)]


def stops(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
  """Sequences of ids that end a continuation on the device: `texts` as the tokenizer spells them, a document's end.

  `Stream` finds the texts that other ids spell.
  """
  spelled = (tuple(ids.tolist()) for ids in tokenizer.encode(list(texts))) if texts else ()
  return (*(ids for ids in spelled if ids), (tokenizer.separator,))


class Stream:
  """Text that is certain: no half characters, and nothing of what may become a stop.

  Args:
    decode: ids [tokens] to text.
    stop: texts at which the text ends.
  """

  def __init__(self, decode: Callable[[np.ndarray], str], stop: Sequence[str] = ()):
    self._decode = decode
    self._stop = tuple(text for text in stop if text)
    self._ids: list[int] = []
    self._told = 0  # characters
    self.ended = False

  def add(self, ids: np.ndarray) -> str:
    """What these tokens add to the text."""
    self._ids += ids.tolist()
    return self._tell(self._settled())

  def rest(self) -> str:
    """What is left when no more tokens come."""
    return self._tell(self._cut()[0])

  def text(self) -> str:
    """All that was told so far."""
    return self._cut()[0][: self._told]

  def _tell(self, text: str) -> str:
    new, self._told = text[self._told :], max(self._told, len(text))
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
  """Reads continuations until all of them have ended, also by a stop that no sequence of ids spells.

  Args:
    blocks: The tokens of all continuations, int32 [rows, up to block] each: see Decoder.generate.
    streams: The text of the first rows; the other rows only fill a batch.
    tokenizer: The tokens' tokenizer.

  Yields:
    A block, and what it adds to each stream.
  """
  for block in blocks:
    rows = zip(streams, block, strict=False)
    added = [
      "" if stream.ended else stream.add(known(ids[ids != tokenizer.separator], tokenizer)) for stream, ids in rows
    ]
    yield block, added
    if all(stream.ended for stream in streams):
      return
