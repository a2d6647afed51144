"""Memory Caching, slowly and obviously: token by token, as the paper's equations read (arXiv:2602.24281).

Every fast path is tested against this file, so it shares nothing with them but the network, the inner loss, where
segments are cut and how documents are numbered. Inner gradients come from `jax.grad`, a soup's weights are really
mixed, every token reads every cache. One `jax.lax.scan` walks the tokens: a Python loop would say the same, and takes
minutes to compile together with its gradients.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.memory import documents, networks, rules, segments


class Caches(NamedTuple):
  """The finished segments of one row and head, a slot for each segment of the row.

  Attributes:
    memory: M^(i), the state at the segment's end: {name: [segments, in, out]}.
    summary: p^(i), [segments, head_dim].
    document: [segments] int32, whom it is visible to; -1 for nobody: not yet finished, or ending in padding.
  """

  memory: networks.Weights
  summary: jax.Array
  document: jax.Array


def memory_caching(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  u: jax.Array,
  gates: dict[str, jax.Array],
  init: networks.Weights,
  *,
  rule: rules.Rule,
  aggregation: str,
  segmentation: segments.Segmentation,
  carry: str,
  top_k: int,
  pool: str,
  gate: str,
  gate_scale: float,
  segment_ids: jax.Array | None,
  token_scores: jax.Array | None,
) -> jax.Array:
  """The whole method; arguments as `mc_jax.memory.memory_caching` documents and checks them.

  q, k, v, u [batch, length, heads, head_dim]; gates {name: [batch, length, heads]}; init {name: [heads, in, out]};
  segment_ids [batch, length] int or None; token_scores [batch, length, heads, ages] or None. Everything is computed in
  q's dtype or float32, whichever is wider. Returns [batch, length, heads, head_dim] in q's dtype, 0 at padding.
  """
  batch, length = q.shape[:2]
  document = documents.index(jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids)
  head = functools.partial(
    _sequence,
    rule=rule,
    aggregation=aggregation,
    lengths=segmentation.lengths(length),
    carry=carry,
    top_k=top_k,
    pool=pool,
    gate=gate,
    gate_scale=gate_scale,
  )
  heads = jax.vmap(head, in_axes=(1, 1, 1, 1, 1, 0, 1, None), out_axes=1)
  rows = jax.vmap(heads, in_axes=(0, 0, 0, 0, 0, None, 0, 0))
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  inputs = jax.tree.map(lambda x: jnp.asarray(x, dtype), (q, k, v, u, gates, init, token_scores))
  return rows(*inputs, document).astype(q.dtype)


def _sequence(
  q, k, v, u, gates, init, token_scores, document, *, rule, aggregation, lengths, carry, top_k, pool, gate, gate_scale
):
  """One row and head: q, k, v, u [length, head_dim]; gates {name: [length]}; document: [length]. To q's shape."""
  number, valid = document.number, document.valid
  before = jnp.pad(number, (1, 0))[:-1]  # the document of the token before; 0 (no document) at the row's start
  segment = jnp.asarray(segments.index(lengths))
  tokens = jnp.arange(len(segment))
  first = jnp.searchsorted(segment, segment)  # of every token's segment, the first token and the last
  last = jnp.searchsorted(segment, segment, side="right") - 1
  slots = jnp.arange(len(lengths))
  nothing = jax.tree.map(jnp.zeros_like, init)

  def token(state, t):
    memory, momentum, chunk_start, chunk_document, caches = state
    if carry == "independent":
      memory, momentum = _select(t == first[t], (init, nothing), (memory, momentum))
    starts_chunk = (t - first[t]) % rule.chunk == 0
    chunk_start, chunk_document = _select(starts_chunk, (memory, before[t]), (chunk_start, chunk_document))

    # Write (Eq. 4).
    memory, momentum = _select(number[t] != before[t], (init, nothing), (memory, momentum))
    gradient_point = _select(number[t] == chunk_document, chunk_start, init)
    earlier = (number == number[t]) & ((first == first[t]) | (carry == "checkpoint"))
    written = _write(rule, memory, momentum, gradient_point, k, v, gates, t, earlier)
    memory, momentum = _select(valid[t], written, (memory, momentum))

    # Read, after the token's own write (Eq. 5).
    own = valid & (number == number[t]) & (segment == segment[t]) & (tokens <= t)
    summary = _pool(k, own, pool)
    if gate == "token":  # scores by age in segments, the online memory's last
      scores = jnp.append(token_scores[t, jnp.maximum(segment[t] - slots, 0)], token_scores[t, 0])
    else:
      scores = jnp.append(jnp.sum(caches.summary * u[t], axis=-1), jnp.sum(summary * u[t]))
    visible = jnp.append(caches.document == number[t], True)
    memories = jax.tree.map(lambda cached, online: jnp.append(cached, online[None], axis=0), caches.memory, memory)
    y = _aggregate(aggregation, rule.network, q[t], memories, gate_scale * scores, visible, gate, top_k)

    finished = Caches(memory, summary, jnp.where(valid[t], number[t], -1))
    slot = (slots == segment[t]) & (t == last[t])
    caches = jax.tree.map(lambda old, new: jnp.where(slot.reshape(-1, *[1] * new.ndim), new, old), caches, finished)
    return (memory, momentum, chunk_start, chunk_document, caches), jnp.where(valid[t], y, 0)

  def slotted(x):
    return jnp.zeros((len(lengths), *x.shape), x.dtype)

  empty = Caches(jax.tree.map(slotted, init), slotted(k[0]), slotted(number[0]) - 1)
  return jax.lax.scan(token, (init, nothing, init, number[0], empty), tokens)[1]


def _write(rule, memory, momentum, gradient_point, k, v, gates, t, earlier):
  """(M_{t-1}, S_{t-1}) to (M_t, S_t), by token t and the window - 1 tokens before it (Eq. 2, 26-36).

  S_t = beta_t S_{t-1} - sum_{i < window} eta^(i)_t grad L(M; k_{t-i}, v_{t-i});  M_t = alpha_t M_{t-1} + S_t

  All these gradients are taken at `gradient_point`, the state before the chunk. Tokens outside `earlier` [length] (of
  another document, or of another segment under independent) are not written again.
  """
  step = jax.tree.map(jnp.zeros_like, memory)
  for i in range(rule.window):
    j = jnp.maximum(t - i, 0)
    eta = jnp.where((t - i >= 0) & earlier[j], gates[rule.steps[i]][t] if rule.step else 1.0, 0)
    gradient = _gradient(rule, gradient_point, k[j], v[j])
    step = jax.tree.map(lambda s, g, eta=eta: s - eta * g, step, gradient)
  if rule.momentum:
    step = jax.tree.map(lambda s, new: gates["beta"][t] * s + new, momentum, step)
  alpha = gates["alpha"][t] if rule.retention else 1.0
  return jax.tree.map(lambda w, s: alpha * w + s, memory, step), step


def _gradient(rule, weights, k, v):
  """grad L(M; k, v) by M's weights, of one token, scaled down to a Frobenius norm of at most rule.max_grad_norm."""
  gradient = jax.grad(lambda w: rule.loss(_read(rule.network, w, k), v))(weights)
  if rule.max_grad_norm is None:
    return gradient
  square = sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient))
  large = square > rule.max_grad_norm**2
  norm = jnp.sqrt(jnp.where(large, square, 1))  # no square root of 0: its derivative is infinite
  return _select(large, jax.tree.map(lambda g: g * (rule.max_grad_norm / norm), gradient), gradient)


def _aggregate(aggregation, network, q, memories, scores, visible, gate, top_k):
  """y_t = Agg({M^(i)}, M_t; q_t) (Eq. 5). Memories, scores and visible are [segments + 1], the online memory last."""
  i = jnp.arange(len(scores))
  online = i == len(scores) - 1
  if aggregation == "none":
    visible, gate = online, "constant"
  elif aggregation == "residual":  # Eq. 7
    gate = "constant"
  elif aggregation == "ssc":  # Eq. 16: of the visible caches, the k of largest score (of equals, the earliest)
    candidates = visible & ~online
    higher = (scores > scores[:, None]) | ((scores == scores[:, None]) & (i < i[:, None]))
    visible = online | (candidates & (jnp.sum(candidates & higher, axis=1) < top_k))
  gamma = _gamma(gate, scores, visible)
  # What a token does not see is zeros to it: 0 times an overflowed state would be NaN.
  memories = jax.tree.map(lambda w: jnp.where(visible[:, None, None], w, 0), memories)
  if aggregation == "soup":  # Eq. 14-15: mix the weights, then read once
    return _read(network, jax.tree.map(lambda w: jnp.sum(gamma[:, None, None] * w, axis=0), memories), q)
  reads = jax.vmap(lambda memory: _read(network, memory, q))(memories)
  return jnp.sum(gamma[:, None] * reads, axis=0)  # Eq. 7, 9, 17


def _gamma(gate, scores, visible):
  """gamma_t [memories] (Eq. 10), exactly 0 where a memory is not visible."""
  if gate == "constant":
    gamma = jnp.ones_like(scores)
  elif gate == "sigmoid":
    gamma = jax.nn.sigmoid(scores)
  elif gate == "uniform":
    gamma = jnp.ones_like(scores) / jnp.sum(visible)
  else:  # softmax, or token: a softmax of other scores
    gamma = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
  return jnp.where(visible, gamma, 0)


def _pool(k, own, pool):
  """A segment's summary: mean (Eq. 10) or sum (Eq. 16) of the keys k [length, head_dim] where own [length]."""
  total = jnp.sum(jnp.where(own[:, None], k, 0), axis=0)
  return total / jnp.maximum(jnp.sum(own), 1) if pool == "mean" else total


def _read(network, weights, x):
  """M(x), x [head_dim], in full precision on machines whose default is less."""
  return network(x, lambda name, z: jnp.matmul(z, weights[name], precision=jax.lax.Precision.HIGHEST))


def _select(condition, a, b):
  """The tree a where the scalar condition holds, else b."""
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
