"""Tokenizers give text back, and say what is wrong with their files."""

import io

import numpy as np
import pytest
import sentencepiece

from mc_jax.data import tokenizers
from mc_jax.errors import ConfigError


@pytest.fixture(scope="module")
def files(tmp_path_factory, texts):
  """{kind: path} of a BPE and a SentencePiece model learned from the texts."""
  folder = tmp_path_factory.mktemp("tokenizers")
  tokenizers.train_bpe(texts, 400, folder / "tokenizer.json")
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts), model_writer=model, vocab_size=80, hard_vocab_limit=False, minloglevel=2
  )
  (folder / "sp.model").write_bytes(model.getvalue())
  return {"bytes": "bytes", "bpe": str(folder / "tokenizer.json"), "sentencepiece": str(folder / "sp.model")}


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece"])
def test_a_text_comes_back(files, texts, kind):
  tokenizer = tokenizers.load(files[kind])
  for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
    assert ids.dtype == np.int32
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.separator not in ids
    assert tokenizer.decode(ids) == text
  pair = np.concatenate([tokenizer.encode(["one"])[0], [tokenizer.separator], tokenizer.encode(["two"])[0]])
  if kind != "sentencepiece":  # which has no piece for every letter
    assert tokenizer.decode(pair) == "one\ntwo"


def test_a_text_that_spells_the_separator_is_text(files):
  tokenizer = tokenizers.load(files["bpe"])
  (ids,) = tokenizer.encode(["a<|endoftext|>b"])
  assert tokenizer.separator not in ids
  assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_the_separator_is_found_or_named(files):
  assert tokenizers.load(files["bpe"]).separator == 0
  assert tokenizers.load(files["sentencepiece"]).separator == 2  # </s>
  assert tokenizers.load(files["sentencepiece"], "<s>").separator == 1
  with pytest.raises(ConfigError, match=r"data\.separator must be a token of .*tokenizer\.json, which has no '<end>'"):
    tokenizers.load(files["bpe"], "<end>")


def test_fingerprints_tell_tokenizers_apart(files):
  prints = [tokenizers.load(path).fingerprint for path in files.values()]
  prints.append(tokenizers.load(files["sentencepiece"], "<s>").fingerprint)
  assert len(set(prints)) == 4
  assert tokenizers.load(files["bpe"]).fingerprint == prints[1]


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
  for name, message in (("a.json", "not a tokenizer.json"), ("a.model", "not a SentencePiece model")):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=message):
      tokenizers.load(str(tmp_path / name))
  with pytest.raises(ConfigError, match=r"data\.tokenizer must be bytes.*cannot read"):
    tokenizers.load(str(tmp_path / "missing.json"))
