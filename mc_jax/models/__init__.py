"""Flax NNX modules: the Memory Caching mixer, a Transformer baseline and the language model."""

from mc_jax.models.cache import Cache, CacheConfig
from mc_jax.models.config import MemoryConfig, ModelConfig
from mc_jax.models.language_model import LanguageModel

__all__ = ["Cache", "CacheConfig", "LanguageModel", "MemoryConfig", "ModelConfig"]
