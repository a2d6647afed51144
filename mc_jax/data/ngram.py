"""Byte unigram and bigram models, the baselines that a run's loss is compared with."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mc_jax.data import tokenizers


def unigram(stream: np.ndarray, alpha: float = 0.1) -> np.ndarray:
  """Log2 probability of each byte, [vocab]: log2((count(b) + alpha) / (sum + alpha vocab))."""
  counts = np.bincount(stream, minlength=tokenizers.VOCAB_SIZE).astype(np.float64) + alpha
  return np.log2(counts / counts.sum())


def bigram(stream: np.ndarray, alpha: float = 0.1) -> np.ndarray:
  """Log2 probability of a byte given the byte before, [vocab (before), vocab].

  log2((count(a, b) + alpha) / (count(a, .) + alpha vocab)), over adjacent bytes of `stream`.
  """
  vocab = tokenizers.VOCAB_SIZE
  pairs = stream[:-1].astype(np.int64) * vocab + stream[1:]
  counts = np.bincount(pairs, minlength=vocab * vocab).reshape(vocab, vocab) + float(alpha)
  return np.log2(counts / counts.sum(axis=1, keepdims=True))


def bits_per_byte(log2_probability: np.ndarray, batches: Iterable[dict[str, np.ndarray]]) -> float:
  """Weighted mean of -log2 p(target) or -log2 p(target | token).

  Args:
    log2_probability: The table from `unigram` or `bigram`.
    batches: Batches such as those of `windows.validation`.
  """
  bits = total = 0.0
  for batch in batches:
    if log2_probability.ndim == 1:
      score = log2_probability[batch["targets"]]
    else:
      score = log2_probability[batch["tokens"], batch["targets"]]
    bits -= float((score * batch["weights"]).sum())
    total += float(batch["weights"].sum())
  return bits / total
