"""Text as bytes: every byte of the UTF-8 encoding is a token."""

from __future__ import annotations

import numpy as np

VOCAB_SIZE = 256
SEPARATOR = 0  # the byte before every file; it cannot occur in one (see sources.is_text)


def encode(text: str | bytes) -> np.ndarray:
  """Tokens of a text, uint8 [length]."""
  data = text.encode("utf-8") if isinstance(text, str) else text
  return np.frombuffer(data, dtype=np.uint8)


def decode(tokens: np.ndarray) -> str:
  """The text of `tokens` [length]; separators become newlines, broken UTF-8 U+FFFD."""
  data = np.asarray(tokens, dtype=np.uint8).tobytes()
  return data.replace(bytes([SEPARATOR]), b"\n").decode("utf-8", errors="replace")
