"""Real text to batches of tokens: sources, windows, and the n-gram models a run is compared with."""

from mc_jax.data import ngram, sources, tokenizers, windows
from mc_jax.data.config import ConfigError, DataConfig

__all__ = ["ConfigError", "DataConfig", "ngram", "sources", "tokenizers", "windows"]
