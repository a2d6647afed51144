"""Flax NNX modules: the layers (Memory Caching, attention, SwiGLU), blocks of them, and the language model."""

from mc_jax.models.cache import Cache, CacheConfig
from mc_jax.models.config import MemoryConfig, ModelConfig
from mc_jax.models.language_model import LanguageModel

__all__ = ["Cache", "CacheConfig", "LanguageModel", "MemoryConfig", "ModelConfig"]
