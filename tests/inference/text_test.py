"""Text as it comes: no half characters, nothing after a stop, nothing lost."""

import numpy as np
import pytest

from mc_jax.data import tokenizers
from mc_jax.inference.text import Stream

TOKENS = tokenizers.load("bytes")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_all_text_comes_in_pieces_that_are_whole_characters(size):
  text = "naïve — ∑ of 鏡 and 🙂 parts"
  ids = TOKENS.encode([text])[0]
  stream = Stream(TOKENS.decode)
  parts = [stream.add(ids[i : i + size]) for i in range(0, len(ids), size)]
  assert "".join(parts) + stream.rest() == text
  assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_nothing_of_a_stop_is_told(size):
  ids = TOKENS.encode(["one, two; three\n\nQ: four"])[0]
  stream = Stream(TOKENS.decode, ["\n\nQ:", "never"])
  told = ""
  for i in range(0, len(ids), size):
    told += stream.add(ids[i : i + size])
    assert "one, two; three".startswith(told)
  assert told + stream.rest() == "one, two; three"
  assert stream.ended


def test_what_only_began_like_a_stop_comes_in_the_end():
  stream = Stream(TOKENS.decode, ["\n\nQ:"])
  told = stream.add(TOKENS.encode(["a\n\n"])[0])
  assert told == "a"
  assert told + stream.rest() == "a\n\n"
  assert np.array_equal(stream.text(), "a\n\n")
