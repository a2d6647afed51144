"""The n-gram models equal counting by hand."""

import itertools
import math

import numpy as np
import pytest

from mc_jax.data import DataConfig, ngram, tokenizers, windows

TRAINING = tokenizers.encode("abracadabra abracadabra")
VALIDATION = tokenizers.encode("bard and cab")
BATCHES = windows.validation(VALIDATION, DataConfig(length=5, batch_size=2))


def test_unigram():
  text = bytes(TRAINING)
  bits = -sum(math.log2((text.count(bytes([b])) + 0.1) / (len(text) + 25.6)) for b in bytes(VALIDATION)[1:])
  expected = bits / (len(VALIDATION) - 1)
  assert ngram.bits_per_byte(ngram.unigram(TRAINING), BATCHES) == pytest.approx(expected, rel=1e-12)


def test_bigram():
  text, scored = bytes(TRAINING), bytes(VALIDATION)
  pairs = list(itertools.pairwise(text))
  bits = 0.0
  for before, byte in itertools.pairwise(scored):
    of_before = sum(first == before for first, _ in pairs)
    bits -= math.log2((pairs.count((before, byte)) + 0.1) / (of_before + 25.6))
  expected = bits / (len(scored) - 1)
  assert ngram.bits_per_byte(ngram.bigram(TRAINING), BATCHES) == pytest.approx(expected, rel=1e-12)


def test_probabilities_sum_to_one():
  assert np.exp2(ngram.unigram(TRAINING)).sum() == pytest.approx(1)
  np.testing.assert_allclose(np.exp2(ngram.bigram(TRAINING)).sum(axis=1), 1)
