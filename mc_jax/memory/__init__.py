"""Memory Caching as pure functions over arrays and pytrees (arXiv:2602.24281)."""

from mc_jax.memory import aggregate, decode, documents, networks, routing, rules, segments, tokens
from mc_jax.memory.caching import memory_caching, run
from mc_jax.memory.options import CARRIES, IMPLEMENTATIONS, Options
from mc_jax.memory.routing import NAMES as GATES
from mc_jax.memory.routing import POOLS
from mc_jax.memory.tokens import Tokens

# Those that come with the package; others can be registered.
RULES = rules.names()
AGGREGATIONS = tuple(aggregate.AGGREGATIONS)

__all__ = [
  "AGGREGATIONS",
  "CARRIES",
  "GATES",
  "IMPLEMENTATIONS",
  "POOLS",
  "RULES",
  "Options",
  "Tokens",
  "aggregate",
  "decode",
  "documents",
  "memory_caching",
  "networks",
  "routing",
  "rules",
  "run",
  "segments",
  "tokens",
]
