"""Memory Caching: the public function (arXiv:2602.24281, section 3).

A sequence is written (every token's online read, every segment's final memory), scored, and read, in two passes that
passes.py runs by XLA and fused.py as TPU kernels. Scores and gates are one number per token and cache.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mc_jax.memory import aggregate, arguments, fused, online, passes, reference, segments
from mc_jax.memory import documents as documents_lib
from mc_jax.memory import gates as gating
from mc_jax.memory.networks import Weights
from mc_jax.memory.options import Options
from mc_jax.memory.passes import Tokens, Written
from mc_jax.memory.rules import Rule


class Passes(NamedTuple):
  """How the passes run: functions with the arguments of those of passes.py."""

  write: Callable[..., Written]
  read_caches: Callable[..., jax.Array]
  read_selected: Callable[..., jax.Array]


class Whole(NamedTuple):
  """A sequence that is all here. One of which a part is here, the rest on other devices, answers as this does.

  Attributes:
    count: how many equal parts of whole segments there are.
  """

  count: int = 1

  def index(self) -> int | jax.Array:
    """Which part is here."""
    return 0

  def gather(self, x: jax.Array) -> jax.Array:
    """Something of each segment here, [segments here, ...], to that of all the sequence's."""
    return x

  def passes(self, local: Passes) -> Passes:
    """The passes over the whole sequence, by passes over what is here."""
    return local


class Reads(NamedTuple):
  """Which caches tokens read.

  Attributes:
    visible: to a token, [b or 1, 1, length, n] bool.
    online, cached: gamma of the online memory [b, h, length] and of the caches [b, h, length, n], under ssc of the k
      selected ones.
    index: under ssc the selected ones, [b, h, length, k] int32; else None.
    kept: under ssc which of these are visible at all; else None.
  """

  visible: jax.Array
  online: jax.Array
  cached: jax.Array
  index: jax.Array | None = None
  kept: jax.Array | None = None


class Cached(NamedTuple):
  """What the passes leave behind, for decoding to go on from and for people to look at.

  Attributes:
    states: at the end of every segment, leaves [segments, b, h, ...].
    summaries: of every segment, [segments, b, h, d]; None where nothing is scored by them.
    reads: None where no cache is read.
  """

  states: online.State
  summaries: jax.Array | None
  reads: Reads | None = None


_XLA = Passes(passes.write, passes.read_caches, aggregate.read_selected)
_KERNELS = Passes(fused.write, fused.read_caches, fused.read_selected)
_INTERPRETED = Passes(*(functools.partial(run, interpret=True) for run in _KERNELS))


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
    gate: "softmax", "sigmoid", "constant" (1), "uniform" (equal shares of what is visible) or "token" (by token_scores,
      blind to what the segments hold).
    gate_scale: multiplies the scores.
    segment_ids: [batch, length] int, packed documents; 0 is padding. None: one document a row.
    token_scores: [batch, length, heads, ages], for gate="token": scores by a memory's age in segments, 0 is online.
    segment_group: independent segments that run side by side; more is faster and takes more memory.
    implementation: None (the best for the platform: kernels where it is compiled for TPUs and they support it), "xla",
      "pallas" (the kernels or an error; off TPU interpreted, for tests), or "reference" (token by token, slow).

  Returns:
    [batch, length, heads, head_dim] in q's dtype; 0 at padding. Whatever that dtype, states, scores and softmax are at
    least float32.

  Differentiable once, in reverse mode. Documents are kept apart as long as states are finite.

  Raises:
    ValueError: an unknown name, a size that is not positive, shapes that do not fit.
  """
  options = Options(
    rule, segmentation, aggregation, carry, top_k, pool, gate, gate_scale, segment_group, implementation
  )
  return with_options(q, k, v, u, gates, init, options, segment_ids=segment_ids, token_scores=token_scores)


def with_options(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  u: jax.Array,
  gates: dict[str, jax.Array],
  init: Weights,
  options: Options,
  *,
  segment_ids: jax.Array | None = None,
  token_scores: jax.Array | None = None,
) -> jax.Array:
  """`memory_caching`, told by Options."""
  tokens = dict(q=q, k=k, v=v, u=u)
  arguments.check_arrays(
    tokens, gates, init, options.rule, options.segmentation, options.gate, segment_ids, token_scores
  )
  if options.implementation == "reference":
    names = ("rule", "aggregation", "segmentation", "carry", "top_k", "pool", "gate", "gate_scale")
    told = {name: getattr(options, name) for name in names}
    return reference.memory_caching(q, k, v, u, gates, init, segment_ids=segment_ids, token_scores=token_scores, **told)
  documents = None if segment_ids is None else documents_lib.index(segment_ids)
  return caching_of_part(q, k, v, u, gates, init, documents, token_scores, options)


def caching_of_part(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  u: jax.Array,
  gates: dict[str, jax.Array],
  init: Weights,
  documents: documents_lib.Documents | None,
  token_scores: jax.Array | None,
  options: Options,
  *,
  parts: Whole = Whole(),  # noqa: B008  (it never changes)
  keep: bool = False,
) -> jax.Array | tuple[jax.Array, Cached]:
  """`memory_caching` for the part of the sequence that is here, arguments taken to be right.

  Its arguments, but for documents: arrays [batch, length] that documents.index made of the whole sequence. With `keep`,
  also what the write pass leaves behind.
  """
  run = functools.partial(_memory_caching, options=options, parts=parts, keep=keep)
  xla = functools.partial(run, _XLA)
  arrays = q, k, v, u, gates, init, documents, token_scores
  if options.implementation == "xla":
    return xla(*arrays)
  unsupported = fused.unsupported(options.rule, options.segmentation.lengths(q.shape[1]), q, init)
  if unsupported:
    if options.implementation == "pallas":
      raise ValueError(f"implementation='pallas' does not support {unsupported}")
    fused.log_fallback(unsupported)
    return xla(*arrays)
  kernels = functools.partial(run, _KERNELS)
  # Off TPU the kernels are only for tests: interpreted, and slow.
  elsewhere = xla if options.implementation is None else functools.partial(run, _INTERPRETED)
  return jax.lax.platform_dependent(*arrays, tpu=kernels, default=elsewhere)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("options", "parts", "keep"))
def _memory_caching(
  by: Passes,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  u: jax.Array,
  gates: Weights,
  init: Weights,
  documents: documents_lib.Documents | None,
  token_scores: jax.Array | None,
  *,
  options: Options,
  parts: Whole,
  keep: bool,
) -> jax.Array | tuple[jax.Array, Cached]:
  """`memory_caching` by the passes given; under jit, so that layers that are alike are traced once."""
  by, rule, gate = parts.passes(by), options.rule, options.gate
  lengths = options.segmentation.lengths(q.shape[1])
  tokens = heads_first(q, k, v, u, gates, documents)
  dtype, wide = q.dtype, online.state_dtype(q.dtype)
  fresh = {name: w.astype(wide) for name, w in init.items()}
  caches = parts.count * len(lengths) - 1  # of the whole sequence; no token comes after the last segment
  segment = parts.index() * len(lengths) + segments.index(lengths)
  visible = _visible(tokens.documents, lengths, segment, parts)
  side_by_side = 1 if options.carries else options.segment_group
  write = functools.partial(by.write, rule, fresh, lengths=lengths, carries=options.carries, side_by_side=side_by_side)
  # Only what the aggregation looks at is pooled and scored.
  by_content, summaries = gating.scored(options.aggregation, gate), None
  if by_content and gate != "token":
    scores, summaries = passes.summarize(rule, tokens, lengths, options.pool, side_by_side=options.segment_group)
    scores = scores, gating.cached_scores(tokens.u, parts.gather(summaries)[:-1])
  elif by_content:
    scores = jnp.moveaxis(token_scores, 2, 1).astype(wide)
    if tokens.documents is not None:
      scores = jnp.where(tokens.documents.valid[..., None], scores, 0.0)
    scores = gating.token_scores(scores, segment, caches)
  else:
    shape = tokens.q.shape[:3]
    scores = jnp.zeros(shape, wide), jnp.zeros((*shape, caches), wide)

  if options.aggregation == "soup":
    # The network runs once, over weights that are a mixture: each layer writes the online memory for its own read of it
    # and makes one gated read over all memories. The mixture is never built.
    gamma_online, gamma = gating.weigh(gate, options.gate_scale, *scores, visible)
    reads = Reads(visible, gamma_online, gamma)
    states = []

    def linear(name, x):
      x = x.astype(dtype)
      own = write(tokens._replace(q=x), read=functools.partial(_read_layer, name, dtype))
      memories = {name: own.states.memory[name]}
      states.append(own.states)
      return gamma_online[..., None] * own.y + by.read_caches(
        aggregate.layer(name), x, gamma, memories, lengths, segment
      )

    y = rule.network(tokens.q, linear)
    states = states[0]  # every layer wrote the same
  else:
    y, states, _ = write(tokens, read=functools.partial(_read_network, rule, dtype))
    reads = None
    match options.aggregation:
      case "residual":
        gamma_online, gamma = gating.weigh("constant", options.gate_scale, *scores, visible)
        reads = Reads(visible, gamma_online, gamma)
        y += by.read_caches(aggregate.whole(rule.network), tokens.q, gamma, states.memory, lengths, segment)
      case "grm":
        gamma_online, gamma = gating.weigh(gate, options.gate_scale, *scores, visible)
        reads = Reads(visible, gamma_online, gamma)
        y = gamma_online[..., None] * y
        y += by.read_caches(aggregate.whole(rule.network), tokens.q, gamma, states.memory, lengths, segment)
      case "ssc":
        index, kept_scores, kept = gating.select(scores[1], visible, options.top_k)
        gamma_online, gamma = gating.weigh(gate, options.gate_scale, scores[0], kept_scores, kept)
        reads = Reads(visible, gamma_online, gamma, index, kept)
        y = gamma_online[..., None] * y
        if caches:
          y += by.read_selected(rule.network, tokens.q, index, gamma, states.memory)
  if tokens.documents is not None:
    y = jnp.where(tokens.documents.valid[..., None], y, 0.0)
  y = jnp.moveaxis(y, 1, 2).astype(dtype)
  return (y, Cached(states, summaries, reads)) if keep else y


def _read_network(rule: Rule, dtype: jnp.dtype, memory: online.Online, x: jax.Array) -> jax.Array:
  """M_t(x_t): the online read of a whole network."""
  return rule.network(x, lambda name, z: online.read(memory, name, z, dtype))


def _read_layer(name: str, dtype: jnp.dtype, memory: online.Online, x: jax.Array) -> jax.Array:
  """x_t W_t: the online read of one layer."""
  return online.read(memory, name, x, dtype)


def _visible(
  documents: documents_lib.Documents | None, lengths: tuple[int, ...], segment: np.ndarray | jax.Array, parts: Whole
) -> jax.Array:
  """Which caches a token sees: [b or 1, 1, length, n] bool.

  Those of earlier segments, and of its own document: a cache belongs to the document of its segment's last token, and
  to none if that is padding.
  """
  earlier = segment[:, None] > jnp.arange(parts.count * len(lengths) - 1)
  if documents is None:
    return earlier[None, None]
  owner = jnp.where(documents.valid, documents.number, -1)[..., np.cumsum(lengths) - 1]
  owner = jnp.moveaxis(parts.gather(jnp.moveaxis(owner, -1, 0)), 0, -1)[..., :-1]
  return earlier & (documents.number[..., :, None] == owner[..., None, :])


def heads_first(q, k, v, u, gates, documents) -> Tokens:
  """[batch, length, heads, ...] to [batch, heads, length, ...]; what padding brings is dropped here, by selects."""
  if documents is not None:
    q, k, v, u = (jnp.where(documents.valid[..., None, None], x, 0) for x in (q, k, v, u))
    gates = {name: jnp.where(documents.valid[..., None], g, 1) for name, g in gates.items()}
    documents = documents_lib.Documents(*(x[:, None] for x in documents))
  q, k, v, u, gates = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), (q, k, v, u, gates))
  return Tokens(q, k.astype(q.dtype), v.astype(q.dtype), u, gates, documents)
