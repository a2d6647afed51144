"""Memory Caching: the scan over segments, and the public function (arXiv:2602.24281, section 3).

Two passes. WRITING walks the segments, and in each its chunks; it gives every token's online read and every segment's
final memory, the cache. READING takes the cache to the queries. A segment is computed again in the backward pass from
the state it started with, and the states that the scan keeps for that are the cache's own: activation memory is
O(states + one segment), never O(length x state). Scores and gates are one number per token and cache.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mc_jax.memory import aggregate, arguments, online, pieces, reference, segments
from mc_jax.memory import documents as documents_lib
from mc_jax.memory import gates as gating
from mc_jax.memory.networks import Weights
from mc_jax.memory.rules import Rule

# Queries that read a cached memory together, at least: each state that is fetched should serve many.
QUERY_TILE = 128


class Tokens(NamedTuple):
  """What the tokens bring; every array [batch, heads or 1, length, ...].

  Attributes:
    q, k, v, u: [b, h, length, d].
    gates: the rule's, {name: [b, h, length]}.
    documents: arrays [b, 1, length]; None for one document a row.
    gamma: weights of the online memory [b, h, length] and of the caches [b, h, length, n]; None while not known.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  u: jax.Array
  gates: dict[str, jax.Array]
  documents: documents_lib.Documents | None
  gamma: tuple[jax.Array, jax.Array] | None = None


class Written(NamedTuple):
  """What the write pass leaves.

  Attributes:
    y: online reads [b, h, length, d].
    scores: the online memory's scores [b, h, length].
    states: the state at the end of every segment, leaves [segments, b, h, ...]; their memories are the cache.
    summaries: p of every segment [segments, b, h, d].
  """

  y: jax.Array
  scores: jax.Array
  states: online.State
  summaries: jax.Array


def memory_caching(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  u: jax.Array,
  gates: dict[str, jax.Array],
  init: Weights,
  *,
  rule: Rule,
  aggregation: str = "grm",
  segmentation: segments.Segmentation,
  carry: str = "checkpoint",
  top_k: int = 2,
  pool: str = "mean",
  gate: str = "softmax",
  gate_scale: float = 1.0,
  segment_ids: jax.Array | None = None,
  token_scores: jax.Array | None = None,
  segment_group: int = 8,
  implementation: str | None = None,
) -> jax.Array:
  """Reads every token from its online memory and the cached ones (arXiv:2602.24281, section 3).

  Args:
    q, k, v: queries, keys, values [batch, length, heads, head_dim]. The rules' default step sizes count on
      L2-normalised keys.
    u: connectors, the gates' queries, like q.
    gates: the rule's per-token scalars (rule.gates), {name: [batch, length, heads]}, as positive values, not logits.
    init: M_0, {name: [heads, in, out]}, from rule.init.
    rule: how a memory writes, from rules.get.
    aggregation: how caches are read: "none" (not at all), "residual" (Eq. 7), "grm" (Eq. 9), "soup" (Eq. 14), "ssc"
      (Eq. 17).
    segmentation: where memories are cached, segments.constant(length) or segments.logarithmic().
    carry: "checkpoint": a segment starts from the last one's state; "independent": from M_0.
    top_k: caches that a token reads under ssc, at most.
    pool: how keys make a segment's summary, "mean" (Eq. 10) or "sum" (Eq. 16).
    gate: "softmax", "sigmoid", "constant" (1) or "token" (by token_scores, blind to what the segments hold).
    gate_scale: multiplies the scores.
    segment_ids: [batch, length] int, packed documents; 0 is padding. None: one document a row.
    token_scores: [batch, length, heads, ages], for gate="token": scores by a memory's age in segments, 0 is online.
    segment_group: independent segments that run side by side; more is faster and takes more memory.
    implementation: None (the best for the platform), "xla", or "reference" (token by token, slow).

  Returns:
    [batch, length, heads, head_dim] in q's dtype; 0 at padding. Whatever that dtype, states, scores and softmax are at
    least float32.

  Differentiable once, in reverse mode. Documents are kept apart as long as states are finite.

  Raises:
    ValueError: an unknown name, a size that is not positive, shapes that do not fit.
  """
  arguments.check_options(aggregation, carry, top_k, pool, gate, gate_scale, segment_group, implementation)
  arguments.check_arrays(dict(q=q, k=k, v=v, u=u), gates, init, rule, segmentation, gate, segment_ids, token_scores)
  if implementation == "reference":
    options = dict(rule=rule, aggregation=aggregation, segmentation=segmentation, carry=carry, top_k=top_k, pool=pool)
    gate_options = dict(gate=gate, gate_scale=gate_scale, segment_ids=segment_ids, token_scores=token_scores)
    return reference.memory_caching(q, k, v, u, gates, init, **options, **gate_options)

  tokens = _heads_first(q, k, v, u, gates, segment_ids)
  wide = online.state_dtype(q.dtype)
  fresh = {name: w.astype(wide) for name, w in init.items()}
  lengths = segmentation.lengths(q.shape[1])
  side_by_side = segment_group if carry == "independent" else 1
  written = write(rule, fresh, tokens, lengths, pool=pool, carries=carry == "checkpoint", side_by_side=side_by_side)

  # From here on, what the aggregation does not use is not computed: under jit, XLA drops it.
  segment, caches = segments.index(lengths), len(lengths) - 1
  visible = _visible(tokens.documents, lengths)
  memories, summaries = {name: w[:-1] for name, w in written.states.memory.items()}, written.summaries[:-1]
  if gate == "token":
    scores = jnp.moveaxis(token_scores, 2, 1).astype(wide)
    if tokens.documents is not None:
      scores = jnp.where(tokens.documents.valid[..., None], scores, 0.0)
    scores = gating.token_scores(scores, segment, caches)
  else:
    scores = written.scores, gating.cached_scores(tokens.u, summaries)

  match aggregation:
    case "none":
      y = written.y
    case "residual":
      _, gamma = gating.weigh("constant", gate_scale, *scores, visible)
      y = written.y + read_caches(rule, tokens.q, gamma, memories, lengths)
    case "grm":
      gamma_online, gamma = gating.weigh(gate, gate_scale, *scores, visible)
      y = gamma_online[..., None] * written.y + read_caches(rule, tokens.q, gamma, memories, lengths)
    case "soup":
      tokens = tokens._replace(gamma=gating.weigh(gate, gate_scale, *scores, visible))
      starts = _starts(rule, fresh, tokens, written.states) if carry == "checkpoint" else None
      y = read_soup(rule, fresh, tokens, memories, starts, lengths, side_by_side=side_by_side)
    case "ssc":
      index, kept_scores, kept = gating.select(scores[1], visible, top_k)
      gamma_online, gamma = gating.weigh(gate, gate_scale, scores[0], kept_scores, kept)
      y = gamma_online[..., None] * written.y
      if caches:
        y += aggregate.read_selected(rule.network, tokens.q, index, gamma, memories)
  if tokens.documents is not None:
    y = jnp.where(tokens.documents.valid[..., None], y, 0.0)
  return jnp.moveaxis(y, 1, 2).astype(q.dtype)


def write(
  rule: Rule, fresh: Weights, tokens: Tokens, lengths: tuple[int, ...], *, pool: str, carries: bool, side_by_side: int
) -> Written:
  """The write pass: every token's online read and score, every segment's final state and summary.

  Args:
    rule: how a memory writes.
    fresh: M_0, {name: [heads, in, out]}.
    tokens: the whole sequence.
    lengths: the segments' lengths.
    pool: "mean" or "sum".
    carries: a segment starts from the last one's state; if not, from M_0.
    side_by_side: segments that run at a time; 1 if they carry.
  """
  dtype = tokens.q.dtype

  def write_chunk(carry, x, _, __):
    state, keys = carry
    state, memory = online.write(rule, state, fresh, x.k, x.v, x.gates, x.documents)
    y = rule.network(x.q, lambda name, z: online.read(memory, name, z, dtype))
    keys, keys_so_far = gating.pool_keys(keys, x.k, memory.seen)
    return (state, keys), (y, gating.online_scores(x.u, gating.summary(keys_so_far, pool))), ()

  def write_segment(state, x, _, __):
    start = state if carries else online.start_state(rule, fresh, x.k)
    carry = start, gating.empty_pool(x.k)
    (end, keys), outputs, _ = pieces.scan(write_chunk, carry, x, _chunks(rule, x), unroll=2)
    return end if carries else None, outputs, (end, gating.summary(keys, pool))

  start = online.start_state(rule, fresh, tokens.k) if carries else None
  _, (y, scores), (states, summaries) = pieces.scan(
    write_segment, start, tokens, lengths, together=side_by_side, remat=True
  )
  return Written(y, scores, states, summaries)


def read_caches(rule: Rule, q: jax.Array, gamma: jax.Array, memories: Weights, lengths: tuple[int, ...]) -> jax.Array:
  """sum_{i<s} gamma_t^(i) M^(i)(q_t) (Eq. 7, 9) for the whole sequence: [b, h, length, d], at least float32.

  q [b, h, length, d], gamma [b, h, length, n], memories {name: [n, b, h, in, out]}, the segments' lengths.
  """
  if len(lengths) == 1:
    return jnp.zeros_like(gamma, shape=q.shape)
  tiles, last = segments.tiles(lengths, QUERY_TILE)

  def read_tile(_, x, __, last):
    q, gamma = x
    return (), aggregate.read_gated(rule.network, q, gamma, memories, last), ()

  return pieces.scan(read_tile, (), (q, gamma), tiles, last=last, remat=True)[1]


def read_soup(
  rule: Rule,
  fresh: Weights,
  tokens: Tokens,
  memories: Weights,
  starts: online.State | None,
  lengths: tuple[int, ...],
  *,
  side_by_side: int,
) -> jax.Array:
  """M*_t(q_t), M*_t's weights a gated mixture of the cached and the online ones (Eq. 14-15): [b, h, length, d].

  The network runs once, and every layer makes one gated read over all memories. The online weights are written again,
  chunk by chunk, from the states that the segments start with (`starts`, leaves [segments, b, h, ...]; None: M_0).
  """
  dtype, batch = tokens.q.dtype, len(tokens.q)

  def read_segment(_, x, start, last):
    start = online.start_state(rule, fresh, x.k) if starts is None else start
    _, y, _ = pieces.scan(functools.partial(read_chunk, last), start, x, _chunks(rule, x), unroll=2)
    return (), y, ()

  def read_chunk(last, state, x, _, __):
    state, memory = online.write(rule, state, fresh, x.k, x.v, x.gates, x.documents)
    gamma_online, gamma = x.gamma

    def linear(name, z):
      y = gamma_online[..., None] * online.read(memory, name, z, dtype)
      if len(lengths) == 1:
        return y
      z, gates = pieces.fold(z, batch), pieces.fold(gamma, batch)
      return y + pieces.unfold(aggregate.read_layer(z, gates, memories[name], last, dtype), len(y))

    return state, rule.network(x.q, linear), ()

  states = () if starts is None else starts
  return pieces.scan(read_segment, (), tokens, lengths, states=states, together=side_by_side, remat=True)[1]


def _chunks(rule: Rule, tokens: Tokens) -> tuple[int, ...]:
  """Chunks restart at every segment; its last one may be ragged."""
  return segments.constant(rule.chunk).lengths(tokens.k.shape[2])


def _starts(rule: Rule, fresh: Weights, tokens: Tokens, ends: online.State) -> online.State:
  """The state every segment starts with, when it carries on from the one before: leaves [segments, b, h, ...]."""
  first = online.start_state(rule, fresh, tokens.k)
  return jax.tree.map(lambda first, ends: jnp.concatenate([first[None], ends[:-1]]), first, ends)


def _visible(documents: documents_lib.Documents | None, lengths: tuple[int, ...]) -> jax.Array:
  """Which caches a token sees: [b or 1, 1, length, n] bool.

  Those of earlier segments, and of its own document: a cache belongs to the document of its segment's last token, and
  to none if that is padding.
  """
  earlier = segments.index(lengths)[:, None] > jnp.arange(len(lengths) - 1)
  if documents is None:
    return earlier[None, None]
  ends = np.cumsum(np.array(lengths[:-1], int)) - 1
  owner = jnp.where(documents.valid, documents.number, -1)[..., ends]
  return earlier & (documents.number[..., :, None] == owner[..., None, :])


def _heads_first(q, k, v, u, gates, segment_ids) -> Tokens:
  """[batch, length, heads, ...] to [batch, heads, length, ...]; what padding brings is dropped here, by selects."""
  documents = None
  if segment_ids is not None:
    documents = documents_lib.index(segment_ids)
    q, k, v, u = (jnp.where(documents.valid[..., None, None], x, 0) for x in (q, k, v, u))
    gates = {name: jnp.where(documents.valid[..., None], g, 1) for name, g in gates.items()}
    documents = documents_lib.Documents(*(x[:, None] for x in documents))
  q, k, v, u, gates = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), (q, k, v, u, gates))
  return Tokens(q, k.astype(q.dtype), v.astype(q.dtype), u, gates, documents)
