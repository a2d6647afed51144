"""Text as it comes: no half characters, nothing after a stop, nothing lost."""

import io

import numpy as np
import pytest
import sentencepiece

from mc_jax.data import tokenizers
from mc_jax.inference.text import Stream, follow, known, stops

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


@pytest.fixture(scope="module", params=["bytes", "bpe", "pieces"])
def tokenizer(request, tmp_path_factory):
  folder, texts = tmp_path_factory.mktemp("tokenizers"), ["a gate of a memory. a segment", "naïve memory, a chunk"] * 20
  tokenizers.train_bpe(texts, 300, folder / "bpe")
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
  )
  (folder / "pieces.model").write_bytes(model.getvalue())
  return tokenizers.load(
    {"bytes": "bytes", "bpe": str(folder / "bpe"), "pieces": str(folder / "pieces.model")}[request.param]
  )


def test_ids_that_no_tokenizer_has_are_no_text(tokenizer):
  ids = tokenizer.encode(["a memory"])[0]
  mixed = np.concatenate([[-1], ids[:1], [tokenizer.vocab_size], ids[1:], [5000]]).astype(np.int32)
  np.testing.assert_array_equal(known(mixed, tokenizer), ids)
  assert tokenizer.decode(known(mixed, tokenizer)) == "a memory"


def test_a_continuation_stops_as_the_tokenizer_spells_it_and_where_its_document_ends(tokenizer):
  assert stops(tokenizer, []) == ((tokenizer.separator,),)
  *spelled, end = stops(tokenizer, ["gate", "", " memory"])
  assert end == (tokenizer.separator,)
  assert spelled == [tuple(ids.tolist()) for ids in tokenizer.encode(["gate", " memory"])]
  stream = Stream(tokenizer.decode, ["gate"])
  text = "".join(stream.add(np.array([i])) for i in tokenizer.encode(["a memory. a gate of"])[0])
  assert (text, stream.ended) == ("a memory. a ", True)


def test_continuations_are_followed_until_all_have_ended():
  streams = [Stream(TOKENS.decode, [";"]), Stream(TOKENS.decode, ["!"])]
  texts = (("one", "ab", "xx"), ("; t", "c!d", "xx"), ("wo;", "efg", "xx"))
  read = []

  def blocks():
    for number, rows in enumerate(texts):
      read.append(number)
      yield np.array([np.pad(ids, (0, 4 - len(ids)), constant_values=-1) for ids in TOKENS.encode(list(rows))])

  added = [new for _, new in follow(blocks(), streams, TOKENS)]
  assert added == [["one", "ab"], ["", "c"]]
  assert read == [0, 1]  # the third row only fills the batch, and the last block is not computed
