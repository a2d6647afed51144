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
    memory, momentum, chunk_start, chunk_document, chunk, caches = state
    if carry == "independent":
      memory, momentum = _select(t == first[t], (init, nothing), (memory, momentum))
    starts_chunk = (t - first[t]) % rule.chunk == 0
    chunk_start, chunk_document = _select(starts_chunk, (memory, before[t]), (chunk_start, chunk_document))

    # Write (Eq. 4).
    memory, momentum = _select(number[t] != before[t], (init, nothing), (memory, momentum))
    gradient_point = _select(number[t] == chunk_document, chunk_start, init)
    earlier = (number == number[t]) & ((first == first[t]) | (carry == "checkpoint"))
    if rule.solve:
      starts = starts_chunk | (number[t] != before[t])
      chunk = _select(starts, _nothing_written(rule, memory, momentum, k), chunk)
      gradient, chunk_after = _solve(rule, init, chunk, k[t], v[t], {name: gate[t] for name, gate in gates.items()}, t)
      chunk = _select(valid[t], chunk_after, chunk)
      written = _step(rule, init, memory, momentum, [gradient], gates, t, earlier)
    else:
      gradients = [_gradient(rule, gradient_point, k[j], v[j]) for j in _window(rule, t)]
      written = _step(rule, init, memory, momentum, gradients, gates, t, earlier)
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
    return (memory, momentum, chunk_start, chunk_document, chunk, caches), jnp.where(valid[t], y, 0)

  def slotted(x):
    return jnp.zeros((len(lengths), *x.shape), x.dtype)

  empty = Caches(jax.tree.map(slotted, init), slotted(k[0]), slotted(number[0]) - 1)
  chunk = _nothing_written(rule, init, nothing, k) if rule.solve else None
  return jax.lax.scan(token, (init, nothing, init, number[0], chunk, empty), tokens)[1]


class Chunk(NamedTuple):
  """The tokens of a chunk so far, of a rule that solves.

  Attributes:
    memory: the state before the chunk; its last layer as it would be now, had the chunk written nothing.
    momentum: the same of the last layer's.
    feature: [length, in], the last layer's input times its gain.
    error: [length, head_dim], what each token wrote: a multiple of the loss's gradient in M(k).
    weight, accumulated: [length], how much of that M and S hold.
  """

  memory: networks.Weights
  momentum: jax.Array
  feature: jax.Array
  error: jax.Array
  weight: jax.Array
  accumulated: jax.Array


def _nothing_written(rule, memory, momentum, k):
  """A chunk that starts with a state."""
  last = networks.last(rule.network, memory)
  nothing = jnp.zeros_like(k[:, 0])
  feature = jnp.zeros((len(k), len(memory[last])), k.dtype)
  return Chunk(memory, momentum[last], feature, jnp.zeros_like(k), nothing, nothing)


def _feature(rule, weights, k):
  """The gain, the length of the gradient of <p, M(k)> in the last layer's output, p = (1, -1, ..) / |p|; its input z.

  The square of gain * z is how much of an error at k a step along the last layer's gradient removes; its product with
  another token's, how much a write there moves the answer here.
  """
  last, inputs = networks.last(rule.network, weights), {}

  def answer(bump):
    def linear(name, z):
      inputs[name] = z
      y = jnp.matmul(z, weights[name], precision=jax.lax.Precision.HIGHEST)
      return y + bump if name == last else y

    return rule.network(k, linear), inputs[last]

  signs = (1 - 2 * (jnp.arange(len(k)) % 2)) / jnp.sqrt(len(k))
  bump = jnp.zeros(weights[last].shape[-1], k.dtype)
  gain, z = jax.grad(lambda bump: (jnp.dot(signs, answer(bump)[0]), answer(bump)[1]), has_aux=True)(bump)
  return jnp.sqrt(jnp.maximum(jnp.sum(gain * gain), 1e-12)), z


def _own(rule, weights, k):
  """What a step of 1 along the last layer's gradient removes of the error at k; at least as if no norm shrank it.

  Features that have died count as if they were as small as the network's get.
  """
  gain, z = _feature(rule, weights, k)
  square = jnp.maximum(jnp.sum(z * z), rule.network.least_features * len(z))
  return max(rule.curvature, 1.0) * jnp.maximum(gain**2, 1.0) * square + 1e-6


def _less_below(rule, gradient):
  """The gradient with the layers below the last scaled down to a share of its square at most."""
  if len(gradient) < 2:
    return gradient
  last = networks.last(rule.network, gradient)
  square = {name: jnp.sum(g * g) for name, g in gradient.items()}
  most = square.pop(last) * rule.frozen_share
  large = sum(square.values()) > most
  share = jnp.where(large, most / jnp.where(large, sum(square.values()), 1.0), 1.0)
  return gradient | {name: share * gradient[name] for name in square}


def _solve(rule, init, chunk, k, v, gates, t):
  """(the gradient of token t's loss at M_{t-1}, in units of the error; the chunk after it).

  At M_{t-1} as far as the last layer goes, whose writes so far in the chunk move the answer M(k) by <feature, theirs>
  times what they wrote. For a matrix this is the delta rule.
  """

  def answer(weights):
    return _read(rule.network, weights, k)

  gain, z = _feature(rule, chunk.memory, k)
  feature = gain * z
  error = jax.grad(lambda y: rule.loss(y, v))(answer(chunk.memory))
  error -= rule.curvature * jnp.einsum("j,ji,i,jd->d", chunk.weight, chunk.feature, feature, chunk.error)
  error /= _own(rule, chunk.memory, k)
  gradient = _less_below(rule, jax.grad(lambda w: jnp.dot(error, answer(w)))(chunk.memory))

  last = networks.last(rule.network, chunk.memory)
  alpha = gates["alpha"] if rule.retention else 1.0
  beta, step = (gates["beta"], (1 - gates["beta"]) * gates["eta"]) if rule.momentum else (0.0, gates["eta"])
  momentum = beta * chunk.momentum
  accumulated = (beta * chunk.accumulated).at[t].set(step)
  memory = chunk.memory | {last: init[last] + alpha * (chunk.memory[last] - init[last]) + momentum}
  return gradient, Chunk(
    memory,
    momentum,
    chunk.feature.at[t].set(feature),
    chunk.error.at[t].set(error),
    alpha * chunk.weight + accumulated,
    accumulated,
  )


def _window(rule, t):
  """Token t and those before it that its window reaches."""
  return [jnp.maximum(t - i, 0) for i in range(rule.window)]


def _step(rule, init, memory, momentum, gradients, gates, t, earlier):
  """(M_{t-1}, S_{t-1}) to (M_t, S_t), by token t and the window - 1 tokens before it (Eq. 2, 26-36).

  S_t = beta_t S_{t-1} - sum_{i < window} eta^(i)_t G_{t-i};  M_t = alpha_t M_{t-1} + S_t

  `gradients` are the window's. Tokens outside `earlier` [length] (of another document, or of another segment under
  independent) are not written again. Normalized momentum averages, its steps are multiplied by 1 - beta_t; its
  retention is towards M_0, M_t = M_0 + alpha_t (M_{t-1} - M_0) + S_t; and below the last layer it has neither.
  """
  last, new, steps = networks.last(rule.network, memory), {}, {}
  for name in memory:
    whole = name == last or not rule.normalized
    beta = gates["beta"][t] if rule.momentum and whole else 0.0
    alpha = gates["alpha"][t] if rule.retention and whole else 1.0
    step = jnp.zeros_like(memory[name])
    for i, gradient in enumerate(gradients):
      eta = jnp.where((t - i >= 0) & earlier[jnp.maximum(t - i, 0)], gates[rule.steps[i]][t] if rule.step else 1.0, 0)
      step -= eta * (1 - beta if rule.normalized else 1.0) * gradient[name]
    steps[name] = beta * momentum[name] + step
    new[name] = alpha * memory[name] + steps[name]
    if rule.normalized:
      new[name] += (1 - alpha) * init[name]
  return new, steps


def _gradient(rule, weights, k, v):
  """grad L(M; k, v) by M's weights, of one token.

  Scaled down to a Frobenius norm of at most rule.max_grad_norm; or, normalized, divided by what a step of 1 along its
  last layer removes of the token's own error (`_own`).
  """
  gradient = jax.grad(lambda w: rule.loss(_read(rule.network, w, k), v))(weights)
  if rule.normalized:
    own = _own(rule, weights, k)
    return _less_below(rule, jax.tree.map(lambda g: g / own, gradient))
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
