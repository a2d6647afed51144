"""Data for training: documents and recall tasks to batches of tokens, and the n-gram models a run is compared with."""

from mc_jax.data import datasets, loader, ngram, recall, sources, tokenizers, windows
from mc_jax.data.config import DataConfig, PackingConfig, PartConfig

__all__ = [
  "DataConfig",
  "PackingConfig",
  "PartConfig",
  "datasets",
  "loader",
  "ngram",
  "recall",
  "sources",
  "tokenizers",
  "windows",
]
