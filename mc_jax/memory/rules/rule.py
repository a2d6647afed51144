"""What a memory-update rule says of itself, and everybody else reads.

A rule fills in a chunk: from the state before it and its tokens, `write` makes the state after it and the online memory
of every token. The scan over segments, the kernels and their gradients, packed documents, decoding, sharding and every
aggregation follow from that.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mc_jax.memory.arithmetic import Solve
from mc_jax.memory.documents import Documents
from mc_jax.memory.networks import Network, Weights


class Gate(NamedTuple):
  """A positive number that a rule takes from every token: [batch, length, heads], or [batch, length, heads, head_dim].

  At padding it is 1.

  Attributes:
    per_channel: one for each key channel instead of one for each head.
  """

  per_channel: bool = False


@dataclasses.dataclass(frozen=True)
class GateInit:
  """Where a gate starts: value = maximum * sigmoid(logit), logit = <x_t, w> + bias."""

  bias: float
  maximum: float = 1.0


def retention_init(segment_length: int) -> GateInit:
  """1 - 1 / (16 segment_length), as a sigmoid: retention alone takes a memory down to 1 / e in 16 segments."""
  return GateInit(math.log(16 * segment_length - 1))


def momentum_init(segment_length: int) -> GateInit:
  """An average of steps over an eighth of the segment, and at least over a token, as a sigmoid."""
  kept = 1 - min(0.95, max(0.1, 8 / segment_length))
  return GateInit(math.log(kept / (1 - kept)))


class State(Protocol):
  """What a memory carries from token to token: a NamedTuple of arrays [batch, heads, ...], such as `chunk.State`.

  Attributes:
    memory: M, {name: [..., in, out]}, at least float32: what is cached. All else is zero in a new memory.
  """

  memory: Weights


class Online(Protocol):
  """The online memories of a chunk's tokens, such as `chunk.Online`."""

  def read(self, name: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x_t W_t of the layer `name`: [..., T, in] to [..., T, out], at least float32, by products in `dtype`."""


class Rule(abc.ABC):
  """A memory-update rule: hashable, static under jit, such as a frozen dataclass.

  A rule whose inner gradients are `frozen` also has `begin`, `within` and `advance`, one whose stretches compose
  by a number (`transition` "scalar" or "channel") has `decay`; others need none of them.

  Attributes:
    name: what errors call it.
    network: M; a matrix, or deep (networks.py).
    chunk: tokens written in one step.
    gates: what it takes from every token, {name: Gate}.
    lookback: earlier tokens whose keys and values are written again by later ones; `State.tail` has them. 0 for most.
    learned_init: M_0 is a learned parameter; if not, it is what `init` gives.
    initial_apart: M_0's answer is as large as what is learned, so that a layer should norm the two apart.
    frozen: errors of a chunk's tokens depend on the state before the chunk, which decoding must keep.
    mixes: weights of several states may be added up, as a soup does; not if each state has a scale of its own.
    transition: how two stretches of tokens compose. "scalar": a state is what came in times a number for each head, or
      "channel": for each key channel, or "matrix": a matrix from the left for each head, plus what was written,
      whatever came in. None: not at all.
  """

  name: str
  network: Network
  chunk: int
  lookback: int = 0
  learned_init: bool = False
  initial_apart: bool = False
  frozen: bool = False
  mixes: bool = True
  transition: str | None = None

  @property
  @abc.abstractmethod
  def gates(self) -> Mapping[str, Gate]:
    """See above."""

  @abc.abstractmethod
  def init(self, key: jax.Array, *, heads: int, head_dim: int, value_dim: int | None = None) -> Weights:
    """M_0: {name: [heads, in, out]} float32.

    Args:
      key: a random key.
      heads: The number of memories.
      head_dim: The width of queries and keys.
      value_dim: The width of values and answers; None: head_dim.

    Raises:
      ValueError: the rule's network cannot answer with this width.
    """

  @abc.abstractmethod
  def gate_init(self, segment_length: int) -> dict[str, GateInit]:
    """Where each gate starts, in the order of `gates`; segment_length in tokens."""

  def starting_gates(self, segment_length: int) -> dict[str, float]:
    """The value that each gate starts at, {name: value}, in the order of `gates`; segment_length in tokens."""
    return {name: start.maximum / (1 + math.exp(-start.bias)) for name, start in self.gate_init(segment_length).items()}

  @abc.abstractmethod
  def start(self, fresh: Weights, k: jax.Array) -> State:
    """M_0 {name: [heads, in, out]} as the state of each sequence of k [batch, heads, T, d], all else zero.

    `chunk.new_memory` makes its `memory`.
    """

  @abc.abstractmethod
  def write(
    self,
    start: State,
    fresh: Weights,
    k: jax.Array,
    v: jax.Array,
    gates: Weights,
    documents: Documents | None,
    *,
    solve: Solve,
    chunk: Any = None,
  ) -> tuple[State, Online]:
    """One chunk step: writes T tokens; returns the state after them and the online memory of each.

    Differentiated in reverse mode, and compiled inside kernels as it stands.

    Args:
      start: the state before the chunk.
      fresh: M_0, {name: [heads, in, out]}, where a document that starts in the chunk begins.
      k: [batch, heads, T, d], zero at padding.
      v: [batch, heads, T, value_dim], zero at padding.
      gates: {name: [batch, heads, T]} or [batch, heads, T, d], at least float32, 1 at padding.
      documents: arrays [batch, 1, T]; None for one document without padding.
      solve: unit lower triangular systems, as arithmetic.solve, on the machine that this is for.
      chunk: with `frozen`, of one token in the middle of a chunk: what came before it there. T is 1 then.
    """

  @abc.abstractmethod
  def token_start(self, fresh: Weights) -> State:
    """`token`'s state of a new memory, of one sequence and head: M_0 {name: [in, out]} as `memory`, all else zero."""

  @abc.abstractmethod
  def token(
    self, state: State, fresh: Weights, k: jax.Array, v: jax.Array, gates: Weights, chunk_begins: jax.Array
  ) -> State:
    """The printed recurrence, for reference.py: one token k [d], v [value_dim], gates {name: [] or [d]} of one head.

    chunk_begins: whether the token is the first of its chunk, or of its document.
    """

  def begin(self, state: State, tokens: int, dtype: jnp.dtype) -> Any:
    """The `chunk` argument of `write` for the first token of a chunk.

    Args:
      state: the state before the chunk.
      tokens: the number of tokens in a chunk.
      dtype: the tokens'.

    Returns:
      A pytree of arrays [batch, heads, ...]; `within` and `advance` return the same.
    """
    raise NotImplementedError(f"rule {self.name!r} is frozen and must define begin")

  def within(self, online: Online) -> Any:
    """The `chunk` argument of `write` for the token that follows those of `online`, which are of one document."""
    raise NotImplementedError(f"rule {self.name!r} is frozen and must define within")

  def advance(self, chunk: Any, place: jax.Array, online: Online, gates: Weights) -> Any:
    """The `chunk` argument of `write` for the next token.

    Args:
      chunk: the argument with which this token was written.
      place: [batch] int32, this token's position in its chunk.
      online: what `write` returned for this token.
      gates: this token's.
    """
    raise NotImplementedError(f"rule {self.name!r} is frozen and must define advance")

  def decay(self, gates: Weights, dtype: jnp.dtype) -> jax.Array:
    """What a stretch of tokens leaves of the state that came in, for each of its rows.

    gates [b, h, T, ...] to an array that broadcasts to [b, h, in, 1].
    """
    raise NotImplementedError(f"rule {self.name!r} has transition={self.transition!r} and must define decay")

  def empty(self, memory: Weights) -> Weights:
    """A memory like `memory` that holds nothing, where what came in is left out of `transition`."""
    return {name: jnp.zeros_like(w) for name, w in memory.items()}

  def joined(self, decay: jax.Array, before: Weights, written: Weights) -> Weights:
    """The memory after a stretch of tokens: what `decay` leaves of `before`, and what was `written` into an empty one.

    A decay of 0 is the end of a document: whatever `before` has, even infinities, is dropped.
    """

    def join(before, written):
      return written + jnp.where(decay == 0, 0.0, decay * jnp.where(decay == 0, 0.0, before))

    return {name: join(before[name], w) for name, w in written.items()}
