"""Draws tokens from logits, with a temperature, top-k, top-p and seed for each request."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
  """How to draw each row's tokens. The values are arrays, so that changing them does not recompile.

  Attributes:
    temperature: [b] float32. Divides the logits; 0 takes the likeliest token.
    top_k: [b] int32. Draw from this many of the likeliest tokens; 0: from all.
    top_p: [b] float32. Draw from the likeliest tokens that together have this probability; 1: from all.
    seed: [b] uint32. A row's draws depend on its seed and its tokens' positions, not on the rest of the batch.
  """

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  seed: jax.Array


def draw(logits: jax.Array, sampling: Sampling, place: jax.Array) -> jax.Array:
  """Draws a token for each row.

  Args:
    logits: [b, vocab_size].
    sampling: How to draw.
    place: [b] int32, the token's index in its continuation.

  Returns:
    [b] int32.
  """
  greedy = sampling.temperature == 0
  scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None]
  narrow = ((sampling.top_k > 0) | (sampling.top_p < 1)).any()  # sorting a vocabulary is slow
  scaled = jax.lax.cond(narrow, _truncate, lambda scaled, *_: scaled, scaled, sampling.top_k, sampling.top_p)
  keys = jax.vmap(lambda seed, place: jax.random.fold_in(jax.random.key(seed), place))(sampling.seed, place)
  drawn = jax.vmap(jax.random.categorical)(keys, scaled)
  return jnp.where(greedy, logits.argmax(-1), drawn).astype(jnp.int32)


def _truncate(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """The logits with -inf for tokens that must not be drawn; the likeliest one always stays."""
  order = jnp.argsort(-logits, axis=-1)
  rank = jnp.argsort(order, axis=-1)
  likely = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
  before = jnp.take_along_axis(jnp.cumsum(likely, axis=-1) - likely, rank, axis=-1)
  probable = (before < top_p[:, None]) | (top_p[:, None] >= 1)  # the rounded sum of the likelier ones may reach 1
  kept = (rank < jnp.where(top_k > 0, top_k, logits.shape[-1])[:, None]) & probable
  return jnp.where(kept | (rank == 0), logits, -jnp.inf)
