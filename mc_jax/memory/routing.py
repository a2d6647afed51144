"""Which memory a token listens to: pooled keys, scores and gates (arXiv:2602.24281, Eq. 9-10, 16-17).

Scores and gates are at least float32. The caches' axis is last: [batch, heads, length, caches].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.memory.arithmetic import product, state_dtype
from mc_jax.memory.documents import Visible

POOLS = ("mean", "sum")
NAMES = ("softmax", "sigmoid", "constant", "uniform", "token")
BLIND = ("constant", "uniform")  # they do not look at the scores


class Pool(NamedTuple):
  """The keys of a segment so far: total [..., d], count [..., 1] (of the last token's document)."""

  total: jax.Array
  count: jax.Array


def empty_pool(k: jax.Array) -> Pool:
  """A pool of no keys, for each sequence of k [..., T, d]."""
  wide = state_dtype(k.dtype)
  return Pool(jnp.zeros((*k.shape[:-2], k.shape[-1]), wide), jnp.zeros((*k.shape[:-2], 1), wide))


def pool_keys(pool: Pool, k: jax.Array, seen: Visible) -> tuple[Pool, Pool]:
  """Adds a chunk's keys [..., T, d].

  Returns:
    The pool after the chunk, and the pool of every token (total [..., T, d], count [..., T, 1]): its own segment's keys
    up to and including its own, never a later one.
  """
  wide = state_dtype(k.dtype)
  total = product(seen.same, k, k.dtype)
  count = seen.same.astype(wide).sum(-1, keepdims=True)
  before = jnp.ones_like(count) if seen.incoming is None else seen.incoming.astype(wide)
  total += before * pool.total[..., None, :]
  count = jnp.broadcast_to(count + before * pool.count[..., None, :], (*total.shape[:-1], 1))
  return Pool(total[..., -1, :], count[..., -1, :]), Pool(total, count)


def summary(pool: Pool, kind: str) -> jax.Array:
  """p: the pool's mean or sum, [..., d]; zero for an empty pool."""
  return pool.total if kind == "sum" else pool.total / jnp.maximum(pool.count, 1.0)


def online_scores(u: jax.Array, summaries: jax.Array) -> jax.Array:
  """<u_t, p_t> of every token with its own online summary: [..., T, d], [..., T, d] to [..., T]."""
  return (u.astype(summaries.dtype) * summaries).sum(-1)


def cached_scores(u: jax.Array, summaries: jax.Array) -> jax.Array:
  """<u_t, p^(i)> of every token with every cache: u [b, h, length, d], summaries [n, b, h, d] to [b, h, length, n]."""
  return jnp.einsum("bhld,nbhd->bhln", u.astype(summaries.dtype), summaries, precision=jax.lax.Precision.HIGHEST)


def scores_by_age(scores: jax.Array, ages: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Scores that ignore what the segments hold (gate="token"), looked up by a memory's age in segments.

  Args:
    scores: [b, h, length, ages], age 0 the online memory.
    ages: int, broadcasts to [b, h, length, n]: of each cache, to each token. (Whatever the last age says where a cache
      is older or not yet there.)

  Returns:
    Online scores [b, h, length] and cached ones [b, h, length, n].
  """
  ages = jnp.clip(ages, 0, scores.shape[-1] - 1)
  return scores[..., 0], jnp.take_along_axis(scores, ages.reshape((1,) * (4 - ages.ndim) + ages.shape), axis=-1)


def weigh(
  kind: str, scale: float, online: jax.Array, cached: jax.Array, visible: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """gamma from scores (Eq. 10, 17).

  Args:
    kind: "softmax" and "token": over the visible memories and the online one; "sigmoid": each alone; "constant": 1;
      "uniform": equal shares of the visible memories and the online one, whatever the scores.
    scale: multiplies the scores first.
    online: [b, h, length].
    cached: [b, h, length, n].
    visible: bool, broadcasts against cached.

  Returns:
    gamma of the online memory [b, h, length] and of the caches [b, h, length, n], exactly 0 where not visible.
  """
  if kind == "constant":
    return jnp.ones_like(online), jnp.where(visible, jnp.ones_like(cached), 0.0)
  if kind == "sigmoid":
    return jax.nn.sigmoid(scale * online), jnp.where(visible, jax.nn.sigmoid(scale * cached), 0.0)
  if kind == "uniform":
    online, cached = jnp.zeros_like(online), jnp.zeros_like(cached)
  scores = jnp.concatenate([online[..., None], jnp.where(visible, cached, -jnp.inf)], -1)
  gamma = jax.nn.softmax(scale * scores, axis=-1)
  return gamma[..., 0], gamma[..., 1:]


def select(cached: jax.Array, visible: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The top_k visible caches of every token (Eq. 16).

  Returns:
    index [b, h, length, k] int32, their scores [b, h, length, k], and which of them are visible at all (a token may see
    fewer than k), k = min(top_k, n).
  """
  ranked = jnp.where(visible, cached, -jnp.inf)
  scores, index = _largest(jax.lax.stop_gradient(ranked), min(top_k, cached.shape[-1]))
  kept = scores > -jnp.inf
  # Picked by comparing, slot by slot: a gather of single numbers takes a TPU, and its compiler, long.
  names = jnp.arange(ranked.shape[-1])
  picked = [jnp.where(i[..., None] == names, ranked, 0.0).sum(-1) for i in jnp.unstack(index, axis=-1)]
  picked = jnp.stack(picked, -1) if picked else scores  # a single segment has no caches
  return index, jnp.where(kept, picked, 0.0), kept


def _largest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The k largest of x [b, h, length, n] and where they are; of equals the first."""
  if x.shape[2] > 1 or k > 8:
    return jax.lax.top_k(x, k)
  # Of single tokens by one maximum after the other: on a CPU top_k takes longer than all else that grows with n.
  names, values, index = jnp.arange(x.shape[-1]), [], []
  for _ in range(k):
    index.append(x.argmax(-1))
    values.append(x.max(-1))
    x = jnp.where(index[-1][..., None] == names, -jnp.inf, x)
  if not k:
    return x[..., :0], jnp.zeros((*x.shape[:-1], 0), jnp.int32)
  return jnp.stack(values, -1), jnp.stack(index, -1).astype(jnp.int32)
