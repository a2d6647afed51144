"""Memory Caching, slowly and obviously: token by token, as the paper's equations read (arXiv:2602.24281).

Every fast path is tested against this file, so it shares nothing with them but what a rule's file has of the token
(`Rule.token`: the printed recurrence, inner gradients by `jax.grad`), where segments are cut and how documents are
numbered. A soup's weights are really mixed, every token reads every cache. One `jax.lax.scan` walks the tokens: a
Python loop would say the same, and takes minutes to compile together with its gradients.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.memory import documents, networks, segments
from mc_jax.memory.options import Options
from mc_jax.memory.tokens import Tokens


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


def run(tokens: Tokens, init: networks.Weights, options: Options) -> jax.Array:
  """The whole method; arguments as `mc_jax.memory.caching.run` documents and checks them.

  Everything is computed in q's dtype or float32, whichever is wider. Returns [batch, length, heads, value_dim] in q's
  dtype, 0 at padding.
  """
  batch, length = tokens.q.shape[:2]
  document = tokens.documents
  if document is None:
    document = documents.index(jnp.ones((batch, length), jnp.int32))
  head = functools.partial(_sequence, options=options)
  heads = jax.vmap(head, in_axes=(1, 0, None), out_axes=1)
  rows = jax.vmap(heads, in_axes=(0, None, 0))
  dtype = jnp.promote_types(tokens.q.dtype, jnp.float32)
  inputs = jax.tree.map(lambda x: jnp.asarray(x, dtype), (tokens._replace(documents=None), init))
  return rows(*inputs, document).astype(tokens.q.dtype)


def _sequence(tokens, init, document, *, options):
  """One row and head: tokens' arrays [length, ...], document's [length]. To [length, value_dim]."""
  q, k, _, u, _, _, token_scores = tokens
  rule, gate = options.rule, options.gate
  lengths = options.segmentation.lengths(len(q))
  number, valid = document.number, document.valid
  before = jnp.pad(number, (1, 0))[:-1]  # the document of the token before; 0 (no document) at the row's start
  segment = jnp.asarray(segments.index(lengths))
  position = jnp.arange(len(segment))
  first = jnp.searchsorted(segment, segment)  # of every token's segment, the first token and the last
  last = jnp.searchsorted(segment, segment, side="right") - 1
  slots = jnp.arange(len(lengths))
  new = rule.token_start(init)

  def token(carry, t):
    state, caches = carry

    # Write (Eq. 4).
    document_begins = number[t] != before[t]
    starts_anew = document_begins | ((t == first[t]) & (options.carry == "independent"))
    state = _select(starts_anew, new, state)
    chunk_begins = document_begins | ((t - first[t]) % rule.chunk == 0)
    x = jax.tree.map(lambda x: x[t], tokens)
    written = rule.token(state, init, x.k, x.v, x.gates, chunk_begins)
    state = _select(valid[t], written, state)

    # Read, after the token's own write (Eq. 5).
    own = valid & (number == number[t]) & (segment == segment[t]) & (position <= t)
    summary = _pool(k, own, options.pool)
    if gate == "token":  # scores by age in segments, the online memory's last
      scores = jnp.append(token_scores[t, jnp.maximum(segment[t] - slots, 0)], token_scores[t, 0])
    else:
      scores = jnp.append(jnp.sum(caches.summary * u[t], axis=-1), jnp.sum(summary * u[t]))
    visible = jnp.append(caches.document == number[t], True)
    memories = jax.tree.map(
      lambda cached, online: jnp.append(cached, online[None], axis=0), caches.memory, state.memory
    )
    y = _aggregate(options, q[t], memories, options.gate_scale * scores, visible)

    finished = Caches(state.memory, summary, jnp.where(valid[t], number[t], -1))
    slot = (slots == segment[t]) & (t == last[t])
    caches = jax.tree.map(lambda old, new: jnp.where(slot.reshape(-1, *[1] * new.ndim), new, old), caches, finished)
    return (state, caches), jnp.where(valid[t], y, 0)

  def slotted(x):
    return jnp.zeros((len(lengths), *x.shape), x.dtype)

  empty = Caches(jax.tree.map(slotted, init), slotted(k[0]), slotted(number[0]) - 1)
  return jax.lax.scan(token, (new, empty), position)[1]


def _aggregate(options, q, memories, scores, visible):
  """y_t = Agg({M^(i)}, M_t; q_t) (Eq. 5). Memories, scores and visible are [segments + 1], the online memory last."""
  aggregation, gate, network = options.aggregation, options.gate, options.rule.network
  i = jnp.arange(len(scores))
  online = i == len(scores) - 1
  if aggregation == "none":
    visible, gate = online, "constant"
  elif aggregation == "residual":  # Eq. 7
    gate = "constant"
  elif aggregation == "ssc":  # Eq. 16: of the visible caches, the k of largest score (of equals, the earliest)
    candidates = visible & ~online
    higher = (scores > scores[:, None]) | ((scores == scores[:, None]) & (i < i[:, None]))
    visible = online | (candidates & (jnp.sum(candidates & higher, axis=1) < options.top_k))
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
