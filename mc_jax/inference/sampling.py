"""From logits to tokens: temperature, top-k, top-p, a seed for each request."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
  """How each row's tokens are drawn; arrays, so that no value compiles anything anew.

  Attributes:
    temperature: [b] float32, divides the logits; 0 takes the likeliest token.
    top_k: [b] int32, tokens that may be drawn, the likeliest; 0: all.
    top_p: [b] float32, the likeliest tokens that together have this probability may be drawn; 1: all.
    seed: [b] uint32. A row's draws depend on its seed and its tokens' places, not on the rest of the batch.
  """

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  seed: jax.Array


def draw(logits: jax.Array, sampling: Sampling, place: jax.Array) -> jax.Array:
  """A token for each row.

  Args:
    logits: [b, vocab_size].
    sampling: see there.
    place: [b] int32, the token's number in its continuation.

  Returns:
    [b] int32.
  """
  greedy = sampling.temperature == 0
  scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None]
  narrow = ((sampling.top_k > 0) | (sampling.top_p < 1)).any()  # sorting a vocabulary takes long
  scaled = jax.lax.cond(narrow, _truncate, lambda scaled, *_: scaled, scaled, sampling.top_k, sampling.top_p)
  keys = jax.vmap(lambda seed, place: jax.random.fold_in(jax.random.key(seed), place))(sampling.seed, place)
  drawn = jax.vmap(jax.random.categorical)(keys, scaled)
  return jnp.where(greedy, logits.argmax(-1), drawn).astype(jnp.int32)


def _truncate(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """-inf for the tokens that may not be drawn; the likeliest always may."""
  order = jnp.argsort(-logits, axis=-1)
  rank = jnp.argsort(order, axis=-1)
  likely = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
  before = jnp.take_along_axis(jnp.cumsum(likely, axis=-1) - likely, rank, axis=-1)
  probable = (before < top_p[:, None]) | (top_p[:, None] >= 1)  # a rounded sum of the likelier ones may reach 1
  kept = (rank < jnp.where(top_k > 0, top_k, logits.shape[-1])[:, None]) & probable
  return jnp.where(kept | (rank == 0), logits, -jnp.inf)
