"""The two passes over a sequence, writing and reading, by XLA (arXiv:2602.24281, section 3).

WRITING walks the segments, and in each its chunks; it gives every token's online read and every segment's final memory,
the cache. READING takes the cache to the queries. A segment is computed again in the backward pass from the state it
started with, and the states that the scan keeps for that are the cache's own: activation memory is O(states + one
segment), never O(length x state).

pallas.py has the same passes as TPU kernels, which run the same functions.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mc_jax.memory import aggregate, arithmetic, pieces, routing, segments
from mc_jax.memory.arithmetic import Solve
from mc_jax.memory.documents import visible
from mc_jax.memory.networks import Weights
from mc_jax.memory.rules import Online, Rule, State
from mc_jax.memory.tokens import Tokens

# Queries that read a cached memory together, at least: each state that is fetched should serve many.
QUERY_TILE = 128

Read = Callable[[Online, jax.Array], jax.Array]


class Written(NamedTuple):
  """What the write pass leaves.

  Attributes:
    y: online reads [b, h, length, out].
    states: the state at the end of every segment, leaves [segments, b, h, ...]; their memories are the cache. The last
      is never read: no token comes after it.
    end: the last of these states, leaves [b, h, ...], if segments carry; None otherwise.
  """

  y: jax.Array
  states: State
  end: State | None


def write_chunk(
  rule: Rule, read: Read, fresh: Weights, state: State, x: Tokens, solve: Solve = arithmetic.solve
) -> tuple[State, jax.Array]:
  """One chunk of the write pass: a state and the chunk's tokens to the state after them and their online reads.

  This is what `jax.lax.scan` runs, and what the kernels run, with a `solve` of their own.
  """
  state, online = rule.write(state, fresh, x.k, x.v, x.gates, x.documents, solve=solve)
  return state, read(online, x.q)


def read_nothing(_: Online, q: jax.Array) -> jax.Array:
  """For a write pass whose states alone are wanted: [..., 0] for each token."""
  return q[..., :0]


def write(
  rule: Rule,
  fresh: Weights,
  tokens: Tokens,
  lengths: tuple[int, ...],
  *,
  read: Read,
  carries: bool,
  side_by_side: int,
  start: State | None = None,
) -> Written:
  """The write pass: every token's online read, every segment's final state.

  Args:
    rule: how a memory writes.
    fresh: M_0, {name: [heads, in, out]}.
    tokens: the whole sequence.
    lengths: the segments' lengths.
    read: (a chunk's online memory, q) to what its tokens read from it.
    carries: a segment starts from the last one's state; if not, from M_0.
    side_by_side: segments that run at a time; 1 if they carry.
    start: the state that comes into the first segment, if they carry; None: M_0.
  """

  def step(state, x, _):
    return *write_chunk(rule, read, fresh, state, x), ()

  def write_segment(state, x, _):
    first = state if carries else rule.start(fresh, x.k)
    end, y, _ = pieces.scan(step, first, x, _chunks(rule, x.k), unroll=2)
    return end if carries else None, y, end

  if start is None and carries:
    start = rule.start(fresh, tokens.k)
  end, y, states = pieces.scan(write_segment, start, tokens, lengths, together=side_by_side, remat=True)
  return Written(y, states, end)


def summarize(
  rule: Rule, tokens: Tokens, lengths: tuple[int, ...], kind: str, *, side_by_side: int
) -> tuple[jax.Array, jax.Array]:
  """Every token's score with the summary of its own segment so far, and every segment's summary (Eq. 10, 16).

  Args:
    rule: for the chunks in which keys are pooled.
    tokens: the whole sequence.
    lengths: the segments' lengths.
    kind: "mean" or "sum".
    side_by_side: segments that run at a time.

  Returns:
    [b, h, length] and [segments, b, h, d], at least float32.
  """

  def step(keys, x, _):
    seen = visible(x.documents, x.k.shape[-2])
    keys, so_far = routing.pool_keys(keys, x.k, seen)
    return keys, routing.online_scores(x.u, routing.summary(so_far, kind)), ()

  def pool_segment(_, x, __):
    keys, scores, _ = pieces.scan(step, routing.empty_pool(x.k), x, _chunks(rule, x.k))
    return None, scores, routing.summary(keys, kind)

  tokens = tokens._replace(q=None, v=None, gates={}, token_scores=None)
  return pieces.scan(pool_segment, None, tokens, lengths, together=side_by_side, remat=True)[1:]


def _chunks(rule: Rule, k: jax.Array) -> tuple[int, ...]:
  """Chunks restart at every segment; its last one may be ragged."""
  return segments.constant(rule.chunk).lengths(k.shape[2])


def read_caches(
  contribution: aggregate.Contribution,
  x: jax.Array,
  gamma: jax.Array,
  memories: Weights,
  lengths: tuple[int, ...],
  counts: np.ndarray | jax.Array,
) -> jax.Array:
  """sum_{i<s} gamma_t^(i) contribution(x_t, M^(i)) for the whole sequence: [b, h, length, out], at least float32.

  Args:
    contribution: what a memory answers, see aggregate.py.
    x: [b, h, length, in].
    gamma: [b, h, length, n].
    memories: {name: [n or more, b, h, in, out]}, in the order in which they were cached.
    lengths: pieces of the token axis, the segments', that query tiles are made of.
    counts: [length] int, ascending: token t reads the first counts[t] memories, at most.
  """
  if not gamma.shape[-1]:
    like = jax.eval_shape(contribution, x, {name: w[0] for name, w in memories.items()})
    return jnp.zeros(like.shape, like.dtype)
  tiles = segments.tiles(lengths, QUERY_TILE)
  last = counts[np.cumsum(tiles) - 1]

  def read_tile(_, x, last):
    x, gamma = x
    return (), aggregate.sum_of_stacked_reads(contribution, x, jnp.moveaxis(gamma, -1, 0), memories, last), ()

  return pieces.scan(read_tile, (), (x, gamma), tiles, last=last, remat=True)[1]
