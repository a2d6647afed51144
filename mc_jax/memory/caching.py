"""Memory Caching: the public function (arXiv:2602.24281, section 3).

A sequence is written (every token's online read, every segment's final memory), scored, and read, by a backend: passes
over the sequence by XLA (xla.py) or as TPU kernels (pallas.py). Scores and gates are one number per token and cache.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mc_jax.memory import aggregate, pallas, reference, routing, segments, selection, xla
from mc_jax.memory import documents as documents_lib
from mc_jax.memory import tokens as tokens_lib
from mc_jax.memory.aggregate import Contribution, Reads
from mc_jax.memory.arithmetic import state_dtype
from mc_jax.memory.documents import Documents
from mc_jax.memory.networks import Network, Weights
from mc_jax.memory.options import Options
from mc_jax.memory.rules import Online, State
from mc_jax.memory.tokens import Tokens
from mc_jax.memory.xla import Written


class Backend(NamedTuple):
  """A way to run the passes over a sequence: functions with the arguments of those of xla.py and selection.py."""

  write: Callable[..., Written]
  read_caches: Callable[..., jax.Array]
  read_selected: Callable[..., jax.Array]


_KERNELS = Backend(pallas.write, pallas.read_caches, pallas.read_selected)
_BACKENDS = {
  "xla": Backend(xla.write, xla.read_caches, selection.read_selected),
  "pallas": _KERNELS,
  "interpreted": Backend(*(functools.partial(function, interpret=True) for function in _KERNELS)),
}


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

  def backend(self, local: Backend) -> Backend:
    """The passes over the whole sequence, by passes over what is here."""
    return local


class Cached(NamedTuple):
  """What the passes leave behind, for decoding to go on from and for people to look at.

  Attributes:
    states: at the end of every segment, leaves [segments, b, h, ...].
    summaries: of every segment, [segments, b, h, d]; None where nothing is scored by them.
    reads: None where no cache is read.
  """

  states: State
  summaries: jax.Array | None
  reads: Reads | None = None


def memory_caching(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  u: jax.Array,
  gates: dict[str, jax.Array],
  init: Weights,
  *,
  segment_ids: jax.Array | None = None,
  token_scores: jax.Array | None = None,
  **options: Any,
) -> jax.Array:
  """Reads every token from its online memory and the cached ones (arXiv:2602.24281, section 3).

  Args:
    q, k: queries and keys [batch, length, heads, head_dim]. The rules' default step sizes count on L2-normalised keys.
    v: values [batch, length, heads, value_dim], as wide as what init's weights answer; see `Rule.init`.
    u: connectors, the gates' queries, like q.
    gates: the rule's (rule.gates), as positive values, not logits: {name: [batch, length, heads]}, or [batch, length,
      heads, head_dim] where the gate is one per channel.
    init: M_0, {name: [heads, in, out]}, from rule.init.
    segment_ids: [batch, length] int, packed documents; 0 is padding. None: one document a row.
    token_scores: [batch, length, heads, ages], for gate="token": scores by a memory's age in segments, 0 is online.
    **options: the fields of `Options`, which has their meaning and defaults: rule and segmentation, and aggregation,
      carry, top_k, pool, gate, gate_scale, segment_group, implementation.

  Returns:
    [batch, length, heads, value_dim] in q's dtype; 0 at padding. Whatever that dtype, states, scores and softmax are at
    least float32.

  Differentiable once, in reverse mode. Documents are kept apart as long as states are finite.

  Raises:
    ValueError: an unknown name, a size that is not positive, shapes that do not fit.
  """
  documents = None
  if segment_ids is not None:
    if segment_ids.shape != q.shape[:2] or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
      got = f"{segment_ids.dtype} {segment_ids.shape}"
      raise ValueError(f"segment_ids must be integers [batch, length] = {q.shape[:2]}; got {got}")
    documents = documents_lib.index(segment_ids)
  return run(Tokens(q, k, v, u, gates, documents, token_scores), init, Options(**options))


def run(tokens: Tokens, init: Weights, options: Options) -> jax.Array:
  """`memory_caching` of a record of tokens."""
  tokens_lib.check(tokens, init, options)
  if options.implementation == "reference":
    return reference.run(tokens, init, options)
  return run_part(tokens, init, options)


def run_part(
  tokens: Tokens,
  init: Weights,
  options: Options,
  parts: Whole = Whole(),  # noqa: B008  (it never changes)
  *,
  keep: bool = False,
) -> jax.Array | tuple[jax.Array, Cached]:
  """`run` for the part of the sequence that is here, arguments taken to be right, documents those of the whole.

  With `keep`, also what the passes leave behind.
  """
  run_by = functools.partial(functools.partial, _run, options, parts, keep)
  if options.implementation == "xla":
    return run_by("xla")(tokens, init)
  unsupported = pallas.unsupported(options.rule, options.segmentation.lengths(tokens.q.shape[1]), tokens.q, init)
  if unsupported:
    if options.implementation == "pallas":
      raise ValueError(f"implementation='pallas' does not support {unsupported}")
    pallas.log_fallback(unsupported)
    return run_by("xla")(tokens, init)
  # Off TPU the kernels are only for tests: interpreted, and slow.
  elsewhere = "xla" if options.implementation is None else "interpreted"
  return jax.lax.platform_dependent(tokens, init, tpu=run_by("pallas"), default=run_by(elsewhere))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
  options: Options, parts: Whole, keep: bool, backend: str, tokens: Tokens, init: Weights
) -> jax.Array | tuple[jax.Array, Cached]:
  """`run_part` by a backend; under jit, so that layers that are alike are traced once."""
  by = parts.backend(_BACKENDS[backend])
  dtype, wide = tokens.q.dtype, state_dtype(tokens.q.dtype)
  lengths = options.segmentation.lengths(tokens.q.shape[1])
  tokens = tokens_lib.heads_first(tokens)
  fresh = {name: w.astype(wide) for name, w in init.items()}
  segment = parts.index() * len(lengths) + segments.index(lengths)
  caches = parts.count * len(lengths) - 1  # of the whole sequence; no token comes after the last segment

  summaries = None
  scored = aggregate.scored(options.aggregation, options.gate)
  if scored and options.gate == "token":
    scores = routing.scores_by_age(tokens.token_scores.astype(wide), segment[:, None] - jnp.arange(caches))
  elif scored:
    own, summaries = xla.summarize(options.rule, tokens, lengths, options.pool, side_by_side=options.segment_group)
    scores = own, routing.cached_scores(tokens.u, parts.gather(summaries)[:-1])
  else:
    shape = tokens.q.shape[:3]
    scores = jnp.zeros(shape, wide), jnp.zeros((*shape, caches), wide)

  memories = _Memories(by, options, fresh, tokens._replace(u=None, token_scores=None), lengths, segment)
  visible = _visible(tokens.documents, lengths, segment, parts)
  y, reads = aggregate.AGGREGATIONS[options.aggregation].read(options, tokens.q, scores, visible, memories)
  if tokens.documents is not None:
    y = jnp.where(tokens.documents.valid[..., None], y, 0.0)
  y = jnp.moveaxis(y, 1, 2).astype(dtype)
  return (y, Cached(memories.states, summaries, reads)) if keep else y


class _Memories:
  """The memories of a sequence while it is traced, as an `Aggregation` reads them."""

  def __init__(self, by, options, fresh, tokens, lengths, segment):
    self.by, self.tokens, self.lengths, self.segment = by, tokens, lengths, segment
    side_by_side = 1 if options.carries else options.segment_group
    self.write = functools.partial(
      by.write, options.rule, fresh, lengths=lengths, carries=options.carries, side_by_side=side_by_side
    )
    self._states = None

  @property
  def states(self) -> State:
    """At the end of every segment, of the latest write. Every online read writes them, and all write the same.

    The latest's, because a read must wait for it: XLA runs loops that do not depend on each other at the same time on
    CPUs, and where sequences are split over devices it then mixes up their collectives (gradients of a soup were wrong,
    and not always the same).
    """
    if self._states is None:
      self._states = self.write(self.tokens, read=xla.read_nothing).states
    return self._states

  def online(self, contribution: Contribution, x: jax.Array) -> jax.Array:
    read = functools.partial(_read_online, contribution, self.tokens.k.dtype)
    written = self.write(self.tokens._replace(q=x), read=read)
    self._states = written.states
    return written.y

  def cached(self, contribution: Contribution, x: jax.Array, gamma: jax.Array) -> jax.Array:
    memories = contribution.weights(self.states.memory)
    return self.by.read_caches(contribution, x, gamma, memories, self.lengths, self.segment)

  def selected(self, network: Network, x: jax.Array, index: jax.Array, gamma: jax.Array) -> jax.Array:
    return self.by.read_selected(network, x, index, gamma, self.states.memory)


def _read_online(contribution: Contribution, dtype: jnp.dtype, online: Online, x: jax.Array) -> jax.Array:
  """What tokens read of their online memories."""
  return contribution.through(lambda name, z: online.read(name, z, dtype), x)


def _visible(
  documents: Documents | None, lengths: tuple[int, ...], segment: np.ndarray | jax.Array, parts: Whole
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
