"""Reading cached memories (arXiv:2602.24281, section 3): all of them, gated, or the few that were selected.

A read is a plain function of (queries, gates, stacked states), in long query tiles; writing, in short chunks, is the
rules'. Stacked states are {name: [n, batch, heads, in, out]}.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from mc_jax.memory import routing
from mc_jax.memory.arithmetic import dense, product, state_dtype
from mc_jax.memory.networks import Linear, Network, Weights


class Contribution(Protocol):
  """What a memory contributes to a read. Static under jit."""

  def through(self, linear: Linear, x: jax.Array) -> jax.Array:
    """Of memories whose layers `linear` reads: x [b, h, T, in] to [b, h, T, out]."""

  def weights(self, memory: Weights) -> Weights:
    """Those of a memory's weights that it reads."""

  def __call__(self, x: jax.Array, memory: Weights) -> jax.Array:
    """Of a state {name: [b, h, in, out]}; at least float32."""


@dataclasses.dataclass(frozen=True)
class ReadNetwork:
  """M(x): what a cached memory contributes to residual and grm (Eq. 7, 9), its hidden layers included."""

  network: Network

  def through(self, linear: Linear, x: jax.Array) -> jax.Array:
    return self.network(x, linear)

  def weights(self, memory: Weights) -> Weights:
    return memory

  def __call__(self, x: jax.Array, memory: Weights) -> jax.Array:
    return self.network(x, dense(memory, x.dtype)).astype(state_dtype(x.dtype))


@dataclasses.dataclass(frozen=True)
class ReadLayer:
  """x W: what a cached memory contributes to one layer of a soup (Eq. 14-15)."""

  name: str

  def through(self, linear: Linear, x: jax.Array) -> jax.Array:
    return linear(self.name, x)

  def weights(self, memory: Weights) -> Weights:
    return {self.name: memory[self.name]}

  def __call__(self, x: jax.Array, memory: Weights) -> jax.Array:
    return product(x, memory[self.name], x.dtype)


class Memories(Protocol):
  """The memories of some tokens, however they are at hand: x [b, h, T, in] to [b, h, T, out], at least float32."""

  def online(self, contribution: Contribution, x: jax.Array) -> jax.Array:
    """Every token's read of its online memory."""

  def cached(self, contribution: Contribution, x: jax.Array, gamma: jax.Array) -> jax.Array:
    """Every token's gated read of the n caches, gamma [b, h, T, n]."""

  def selected(self, network: Network, x: jax.Array, index: jax.Array, gamma: jax.Array) -> jax.Array:
    """Every token's gated read of the k caches that it chose, index and gamma [b, h, T, k]."""


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


class Aggregation(NamedTuple):
  """A way to read memories: y_t = Agg({M^(i)}, M_t; q_t) (Eq. 5), whether a sequence is written or a token decoded.

  Attributes:
    read: (options, q, scores, visible, memories) to (y, Reads or None if no cache is read). options are `Options`; q is
      [b, h, T, d]; scores are those of the online memory [b, h, T] and of the caches [b, h, T, n], zeros if nothing is
      scored; visible is bool, which caches a token may read, and broadcasts against these; y is [b, h, T, value_dim],
      at least float32.
    caches: which are read: "none", "all" that are visible, or "selected", some of each token's choice.
    gated: whether scores weigh the memories.
    mixes: whether it adds up the weights of memories, and not their answers.
  """

  read: Callable[..., tuple[jax.Array, Reads | None]]
  caches: str = "all"
  gated: bool = True
  mixes: bool = False


def none(options, q, scores, visible, memories):
  """The online memory alone: the recurrence itself."""
  return memories.online(ReadNetwork(options.rule.network), q), None


def residual(options, q, scores, visible, memories):
  """The sum of all (Eq. 7)."""
  return _read_all(options, q, routing.weigh("constant", 1.0, *scores, visible), visible, memories)


def grm(options, q, scores, visible, memories):
  """Gated residual memory: the sum of all, weighed (Eq. 9)."""
  return _read_all(options, q, routing.weigh(options.gate, options.gate_scale, *scores, visible), visible, memories)


def soup(options, q, scores, visible, memories):
  """Memory soup: one read of weights that are a mixture (Eq. 14-15)."""
  gamma_online, gamma = routing.weigh(options.gate, options.gate_scale, *scores, visible)

  # The network runs once: each layer writes the online memory for its own read of it and makes one gated read over all
  # memories. The mixture is never built.
  def mixed(name, x):
    x = x.astype(q.dtype)
    return gamma_online[..., None] * memories.online(ReadLayer(name), x) + memories.cached(ReadLayer(name), x, gamma)

  return options.rule.network(q, mixed), Reads(visible, gamma_online, gamma)


def ssc(options, q, scores, visible, memories):
  """Sparse selective caching: the online memory, and the top_k caches by score, weighed (Eq. 16-17)."""
  network = options.rule.network
  index, kept_scores, kept = routing.select(scores[1], visible, options.top_k)
  gamma_online, gamma = routing.weigh(options.gate, options.gate_scale, scores[0], kept_scores, kept)
  y = gamma_online[..., None] * memories.online(ReadNetwork(network), q)
  if index.shape[-1]:  # a single segment has no caches
    y += memories.selected(network, q, index, gamma)
  return y, Reads(visible, gamma_online, gamma, index, kept)


def _read_all(options, q, gamma, visible, memories):
  read, (gamma_online, gamma) = ReadNetwork(options.rule.network), gamma
  y = gamma_online[..., None] * memories.online(read, q) + memories.cached(read, q, gamma)
  return y, Reads(visible, gamma_online, gamma)


AGGREGATIONS = {
  "none": Aggregation(none, caches="none", gated=False),
  "residual": Aggregation(residual, gated=False),
  "grm": Aggregation(grm),
  "soup": Aggregation(soup, mixes=True),
  "ssc": Aggregation(ssc, caches="selected"),
}


def register(name: str, aggregation: Aggregation) -> None:
  """Gives an aggregation a name, by which options and configurations find it.

  Raises:
    ValueError: the name is taken.
  """
  if name in AGGREGATIONS:
    raise ValueError(f"there is an aggregation {name!r} already; names are {', '.join(AGGREGATIONS)}")
  AGGREGATIONS[name] = aggregation


def scored(name: str, gate: str) -> bool:
  """Whether an aggregation tells memories apart by scores: not where none is read, nor where all weigh the same."""
  aggregation = AGGREGATIONS[name]
  return aggregation.caches == "selected" or (aggregation.gated and gate not in routing.BLIND)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_sum(
  contribution: Contribution, x: jax.Array, gates: jax.Array, states: Weights, count: jax.Array
) -> jax.Array:
  """sum_{i < count} gamma_i contribution(x, M^(i)): one accumulator, through which the states stream.

  Memories from `count` on are not touched, forward or backward: what is not yet cached costs nothing and cannot leak.
  No [n, tokens, ...] array exists; the backward pass computes each contribution again.

  Args:
    contribution: (x [b, h, T, in], {name: [b, h, in, out]}) to [b, h, T, out].
    x: [b, h, T, in].
    gates: [n, b, h, T]. Where a gate is 0 the memory's contribution is dropped, not multiplied.
    states: {name: [n, b, h, in, out]}.
    count: int, may be traced.
  """
  return sum_of_reads(contribution, x, gates, functools.partial(_at, states), count)


def sum_of_reads(
  contribution: Contribution,
  x: jax.Array,
  gates: jax.Array,
  fetch: Callable[[int | jax.Array], Weights],
  count: int | jax.Array,
) -> jax.Array:
  """`gated_sum` of memories that are fetched by their numbers 0, 1, ..., count - 1."""
  shape = jax.eval_shape(lambda x: contribution(x, fetch(0)), x)

  def add(i, total):
    gate = gates[i][..., None]
    return total + jnp.where(gate == 0, 0.0, gate * contribution(x, fetch(i)))

  return lax.fori_loop(0, count, add, jnp.zeros(shape.shape, shape.dtype))


def _gated_sum_forward(contribution, x, gates, states, count):
  return gated_sum(contribution, x, gates, states, count), (x, gates, states, count)


def _gated_sum_backward(contribution, residuals, cotangent):
  x, gates, states, count = residuals

  def add(i, totals):
    x_total, gate_totals, state_totals = totals
    y, pull = jax.vjp(contribution, x, _at(states, i))
    gate = gates[i]
    used = (gate != 0)[..., None]
    x_part, state_part = pull(jnp.where(used, gate[..., None] * cotangent, 0.0).astype(y.dtype))
    gate_part = jnp.where(gate == 0, 0.0, (y * cotangent).sum(-1))
    put = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
    return x_total + x_part, put(gate_totals, gate_part), jax.tree.map(put, state_totals, state_part)

  wide = state_dtype(x.dtype)
  zeros = (jnp.zeros(x.shape, wide), jnp.zeros_like(gates), jax.tree.map(jnp.zeros_like, states))
  x_total, gate_totals, state_totals = lax.fori_loop(0, count, add, zeros)
  return x_total.astype(x.dtype), gate_totals, state_totals, None


gated_sum.defvjp(_gated_sum_forward, _gated_sum_backward)


def _at(states: Weights, i: jax.Array) -> Weights:
  return {name: lax.dynamic_index_in_dim(w, i, 0, keepdims=False) for name, w in states.items()}
