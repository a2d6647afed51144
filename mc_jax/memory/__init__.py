"""Memory Caching as pure functions over arrays and pytrees (arXiv:2602.24281)."""

from mc_jax.memory import documents, networks, rules, segments

__all__ = ["documents", "networks", "rules", "segments"]
