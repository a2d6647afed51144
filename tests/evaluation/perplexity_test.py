"""Losses by position and at several lengths, of models whose losses are known."""

import dataclasses
import math

import chex
import numpy as np
import pytest

from mc_jax.data import DataConfig, PackingConfig, PartConfig
from mc_jax.data.recall import CopyingConfig
from mc_jax.errors import ConfigError
from mc_jax.evaluation import Options, perplexity

COPYING = PartConfig(source="copying", copying=CopyingConfig(shortest=5, longest=10))


def of_position(batch):
  """Bits: a byte costs 8, half of it from the 16th in its document on."""
  late = perplexity.positions(batch) >= 16
  return np.where(late, 4, 8) * math.log(2), np.zeros_like(late)


def test_every_length_scores_the_same_text(oracle):
  subject = oracle(of_position, length=32, validation_tokens=0)
  short, middle, long = perplexity.run(subject, Options(lengths=(64, 16, 32)))
  assert [r.settings["length"] for r in (short, middle, long)] == [16, 32, 64]
  assert short.values["tokens"] == middle.values["tokens"] == long.values["tokens"] > 500
  assert short.values["bits_per_byte"] == pytest.approx(8)
  assert short.values["perplexity"] == pytest.approx(256)
  assert 5.9 < middle.values["bits_per_byte"] < 6.1  # the last row is not full
  assert 4.9 < long.values["bits_per_byte"] < 5.1
  assert [(c["from"], c["to"]) for c in long.curve] == [(0, 16), (16, 24), (24, 32), (32, 48), (48, 64)]
  chex.assert_trees_all_close([c["loss"] / math.log(2) for c in long.curve], [8.0, 4.0, 4.0, 4.0, 4.0])
  assert sum(c["tokens"] for c in long.curve) == long.values["tokens"]


def test_the_runs_length_is_the_default(oracle):
  (result,) = perplexity.run(oracle(of_position, length=32), Options())
  assert result.settings == {"length": 32, "source": "text"}


def test_positions_start_again_with_a_document():
  tokens = np.zeros((2, 6), np.int32)
  ids = np.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 1, 2, 2]])
  expected = [[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 0, 1]]
  assert perplexity.positions({"tokens": tokens, "segment_ids": ids}).tolist() == expected
  assert perplexity.positions({"tokens": tokens}).tolist() == [[*range(6)]] * 2


def test_sources_of_text_are_told_apart_and_together(oracle, texts):
  text = PartConfig(source="text", paths=str(texts))
  data = DataConfig(
    source="mixture",
    sources={"one": text, "two": dataclasses.replace(text, split="validation"), "task": COPYING},
    packing=PackingConfig(method="concat"),
    length=64,
    batch_size=2,
    validation_fraction=0.3,
    validation_tokens=768,
  )
  results = list(perplexity.run(oracle(of_position, vocab_size=8192, data=data), Options(lengths=(32, 64))))
  assert [tuple(r.settings.values()) for r in results] == [
    (length, name) for length in (32, 64) for name in ("one", "two", "all")
  ]
  one, two, both = results[3:]
  assert both.values["tokens"] == one.values["tokens"] + two.values["tokens"]
  weighted = sum(r.values["loss"] * r.values["tokens"] for r in (one, two)) / both.values["tokens"]
  assert both.values["loss"] == pytest.approx(weighted)


def test_what_cannot_be_is_told(oracle):
  with pytest.raises(ConfigError, match=r"must divide the longest, 64, .*got 24"):
    next(perplexity.run(oracle(of_position), Options(lengths=(24, 64))))
  task = DataConfig(source="copying", copying=COPYING.copying, length=64, batch_size=2, validation_tokens=128)
  with pytest.raises(ConfigError, match="recall tasks alone"):
    next(perplexity.run(oracle(of_position, vocab_size=8192, data=task), Options()))
  with pytest.raises(ConfigError, match=r"needs a model\.vocab_size of at least 256"):
    next(perplexity.run(oracle(of_position, vocab_size=100), Options()))
