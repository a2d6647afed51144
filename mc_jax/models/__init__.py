"""Flax NNX modules: the Memory Caching mixer, a Transformer baseline and the language model."""

from mc_jax.models.config import MemoryConfig, ModelConfig

__all__ = ["MemoryConfig", "ModelConfig"]
