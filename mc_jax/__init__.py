"""Memory Caching: RNNs with growing memory (arXiv:2602.24281), in JAX for TPUs."""

__version__ = "0.1.0"
