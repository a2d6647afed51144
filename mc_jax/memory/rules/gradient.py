"""Gradient steps on a token's inner loss: linear, swla, dla, titans (arXiv:2602.24281, section 4.3).

A rule is three choices: the memory's network, the inner loss, the inner optimiser. The optimiser is one recurrence, of
which every rule switches parts on:

  S_t = beta_t S_{t-1} - sum_{i < window} eta^(i)_t grad L(M; k_{t-i}, v_{t-i})   momentum; without it, just the step
  M_t = alpha_t M_{t-1} + S_t                                                     retention; without it, alpha = 1

Inner gradients are taken at the state before the chunk, so that a layer's gradient at token j is an outer product of
its input z_j and its output's error delta_j, as chunk.py has it.

A rule that SOLVES takes the error of token t not at W_0 but at W_{t-1}, as far as the network's LAST layer goes (the
others are frozen, their features z at W_0). W_{t-1} has the same form with the coefficients of the row before, A'_t =
A_{t-1}, c'_t = c_{t-1}, C'_tj = C_{t-1,j}, so that with r_t the error at A'_t W_0 + c'_t S_0 and g the loss's curvature

  delta_t = r_t - sum_{j<t} N_tj delta_j,   N_tj = g C'_tj <z_t, z_j>,   or   (I + N) delta = r

(times the gains of the answer in the layer's output, where a norm follows it). For a matrix this is the delta rule,
exact at every chunk length.

Retention and momentum of a NORMALIZED rule are the last layer's, too, which holds what is stored; and what fades there
makes way for M_0, W_t = A_t W_0 + (1 - A_t) M_0 + ... The layers below make its features. They neither fade, for
without features nothing can be stored, nor wait: W_t = W_0 - sum_j eta_j f_j z_j (x) delta_j. What they write is not
solved for and could overshoot: f_j <= 1 lets them remove of the token's own error, all together, at most
`frozen_share` of what the last layer does. Nor may steps grow as features die, see `Keys.scale`. Without either, a
memory that is carried on through tokens that cannot be learned grows without bound, and amplifies roundings.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.memory import arithmetic, networks
from mc_jax.memory import chunk as chunks
from mc_jax.memory.arithmetic import Solve, gram, product, square, state_dtype
from mc_jax.memory.chunk import Online, State
from mc_jax.memory.documents import Documents, Visible, visible
from mc_jax.memory.networks import Linear, Weights
from mc_jax.memory.rules.rule import Gate, GateInit, Rule, momentum_init, retention_init

_MOMENTUM = 0.9  # where the printed rules' starts

# Added to what steps are divided by: keys of padding are zero.
_TINY = 1e-6
_LEAST_GAIN = 1e-12  # below it a square root's derivative is of no use
_NOTHING = 1e-18  # added to what may be 0 / 0: the derivative has its inverse squared, which is finite in float32

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def dot_loss(y: jax.Array, v: jax.Array) -> jax.Array:
  """-<y, v> over the last axis: [..., d], [..., d] to [...]. Matrix memory: Hebbian (arXiv:2602.24281, Eq. 2, 30)."""
  return -(y * v).sum(-1)


def squared_loss(y: jax.Array, v: jax.Array) -> jax.Array:
  """||y - v||^2 over the last axis, summed and without a half (arXiv:2602.24281, Eq. 34-35)."""
  return jnp.square(y - v).sum(-1)


class Solving(NamedTuple):
  """The tokens of a chunk so far, by which a rule that solves corrects the next token's error.

  Attributes:
    momentum: beta_{t-1} .. beta_1 S_0 of the last layer, [..., in, out]; None without momentum.
    features: of the tokens, see `Keys`, [..., T, in].
    answers: delta of the network's answers, in steps, [..., T, value_dim].
    mix, accumulated: row t - 1 of C and of Q B, [..., T], 0 for tokens to come; accumulated is None without momentum.
  """

  momentum: jax.Array | None
  features: jax.Array
  answers: jax.Array
  mix: jax.Array
  accumulated: jax.Array | None


class Chunk(NamedTuple):
  """What the inner gradient of a chunk's next token depends on.

  Attributes:
    memory: where it is taken, {name: [..., in, out]}: W_0; the last layer of a rule that solves, A'_t W_0 + c'_t S_0.
    solving: the rest, of a rule that solves; else None.
  """

  memory: Weights
  solving: Solving | None


@dataclasses.dataclass(frozen=True)
class GradientRule(Rule):
  """A gradient step on the inner loss; make one with `rules.get`, or directly for one of your own.

  Attributes:
    name: what errors call it.
    network: M, see networks.py.
    loss: inner loss of (M(k) [..., value_dim], v [..., value_dim]) to [...].
    retention: M decays by alpha_t each token.
    momentum: steps accumulate in S, which decays by beta_t.
    normalized: steps are in units of the error. A gradient is divided by what a step of 1 along it would remove of its
      own token's error, to first order (a dot loss: would write of its own value), so that eta is the share that a
      write removes; momentum averages the steps, S_t = beta_t S_{t-1} - (1 - beta_t) eta_t G_t; and what fades makes
      way for M_0, M_t = M_0 + alpha_t (M_{t-1} - M_0) + S_t. All this is the network's last layer's, which stores; the
      layers below, which make its features, take their steps at once and keep them, and write at most `frozen_share` of
      what the last layer does.
    solve: of a normalized squared loss: a token's error is taken at the state before the token, to first order in what
      its chunk has written (the module's text), and not at the state before the chunk: chunks do not overshoot.
    window: how many of the last tokens each token writes, with a step size eta of its own each.
    step: whether there are step-size gates; without them every step is 1.
    max_grad_norm: each token's inner gradient, all layers together, is scaled down to this Frobenius norm; None: never.
    max_step: the largest eta; None: 1 for matrices, (1 - beta at its start) / chunk for networks, because gradients
      frozen over a chunk add up to one step and overshoot.
    chunk: tokens whose inner gradients are taken at one state, that before the chunk. 1 is the exact recurrence.
    learned_init: M_0 is a learned parameter (networks) or fixed (matrices start at 0).
  """

  name: str
  network: networks.Network
  loss: Loss
  chunk: int = 64
  retention: bool = False
  momentum: bool = False
  normalized: bool = False
  solve: bool = False
  window: int = 1
  step: bool = True
  max_grad_norm: float | None = None
  max_step: float | None = None
  learned_init: bool = True

  def __post_init__(self):
    if self.chunk < 1:
      raise ValueError(f"chunk must be at least 1 token, got {self.chunk}")
    if self.window < 1:
      raise ValueError(f"window must be at least 1 token, got {self.window}")
    if self.normalized and (self.max_grad_norm is not None or self.window > 1 or not self.step):
      raise ValueError(
        "normalized steps need a step size, a window of 1, and no max_grad_norm: they are bounded anyway"
      )
    if self.normalized and not hasattr(self.network, "least_features"):
      raise ValueError(f"normalized steps need a network with least_features (networks.py), got {self.network!r}")
    if self.solve and not (self.normalized and self.curvature):
      raise ValueError("solve needs normalized steps and the squared loss, whose error changes with the state")
    for field in ("max_grad_norm", "max_step"):
      if getattr(self, field) is not None and getattr(self, field) <= 0:
        raise ValueError(f"{field} must be positive or None, got {getattr(self, field)}")

  @property
  def steps(self) -> tuple[str, ...]:
    """Names of the step-size gates, the current token's first."""
    if not self.step:
      return ()
    return ("eta",) if self.window == 1 else tuple(f"eta{i}" for i in range(self.window))

  @property
  def gates(self) -> dict[str, Gate]:
    """Retention alpha, momentum beta and step sizes eta, as far as the rule has them: a number a head."""
    return dict.fromkeys(("alpha",) * self.retention + ("beta",) * self.momentum + self.steps, Gate())

  @property
  def lookback(self) -> int:
    """Tokens before a token that it writes again."""
    return self.window - 1

  @property
  def initial_apart(self) -> bool:
    """Of normalized rules M_0 is as loud as what is learned."""
    return self.normalized

  @property
  def curvature(self) -> float:
    """The loss's second derivative in the answer: 2 of the squared loss, 0 of the dot loss."""
    return 2.0 if self.loss is squared_loss else 0.0

  @property
  def frozen(self) -> bool:
    """Whether inner gradients depend on the state: all but a matrix's of the dot loss."""
    return self.loss is not dot_loss or not isinstance(self.network, networks.Matrix)

  @property
  def transition(self) -> str | None:
    """A number, where gradients do not depend on the state and are not clipped, and there is no momentum."""
    composes = not (self.frozen or self.momentum or self.max_grad_norm is not None)
    return "scalar" if composes else None

  @property
  def frozen_share(self) -> float:
    """The share of their own errors that writes may remove, if a chunk's are all taken at the state before it.

    1 over the largest eigenvalue of their keys' Gram matrix, above which they overshoot: of unit keys after a SiLU it
    is near 0.12 a key.
    """
    return 1 / (0.12 * self.chunk + 1.5)

  def init(self, key: jax.Array, *, heads: int, head_dim: int, value_dim: int | None = None) -> networks.Weights:
    """M_0: {name: [heads, in, out]} float32, see `Rule.init`."""
    return self.network.init(key, heads, head_dim, value_dim)

  def gate_init(self, segment_length: int) -> dict[str, GateInit]:
    """Where the gates start, chosen so that no memory dies or blows up.

    alpha: 1 - 1 / (16 segment_length). As printed, retention pulls a network towards zero, and a network of zeros
      cannot learn: at 1 - 1 / segment_length a memory that is carried on had died after some twenty segments, whatever
      its depth, for what it writes in a token is worth no more than that decay (tests/memory/stability_test.py).
    beta: 0.9; of normalized steps an average over an eighth of the segment, and at least over a token.
    Step sizes: half their maximum, which is max_step or what `_max_step` has.
    """
    max_step = self._max_step(segment_length) if self.max_step is None else self.max_step
    starts = {name: GateInit(0.0, max_step) for name in self.steps}
    if self.retention:
      starts["alpha"] = retention_init(segment_length)
    if self.momentum:
      printed = GateInit(math.log(_MOMENTUM / (1 - _MOMENTUM)))
      starts["beta"] = momentum_init(segment_length) if self.normalized else printed
    return {name: starts[name] for name in self.gates}

  def _max_step(self, segment_length: int) -> float:
    """The largest step size where none is given."""
    if not self.normalized:
      return ((1 - _MOMENTUM) if self.momentum else 1.0) / self.chunk if self.learned_init else 1.0
    if self.solve:
      return 1.5
    # A dot loss never corrects itself: over a segment as frozen gradients over a chunk.
    return self.frozen_share if self.curvature else 2 / (0.1 * segment_length + 1)

  def start(self, fresh: Weights, k: jax.Array) -> State:
    """M_0, no momentum, an empty window, see `Rule.start`."""
    memory = chunks.new_memory(fresh, k)
    momentum = None
    if self.momentum:
      names = [networks.last(self.network, fresh)] if self.normalized else memory
      momentum = {name: jnp.zeros_like(memory[name]) for name in names}
    tail = None
    if self.window > 1:
      widths = k.shape[-1], networks.value_dim(self.network, fresh, k.shape[-1])
      tail = tuple(jnp.zeros((*k.shape[:-2], self.window - 1, width), k.dtype) for width in widths)
    return State(memory, momentum, tail)

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
    chunk: Chunk | None = None,
  ) -> tuple[State, Online]:
    """One chunk step, see `Rule.write`."""
    dtype, last = k.dtype, networks.last(self.network, fresh)
    seen = visible(documents, k.shape[-2], self.window)
    if self.window > 1:
      k, v = (jnp.concatenate([x, tail], -2) for tail, x in zip(start.tail, (k, v), strict=True))
    c, prior = self._coefficients(gates, fresh, seen, dtype)
    at = chunks.start_read(start, fresh, seen.keys_incoming, dtype)
    if chunk is not None:
      at = arithmetic.dense(chunk.memory, dtype)
    elif self.solve:
      at = chunks.before_writes(at, start, fresh, last, seen.keys_incoming, prior, dtype)
    keys = key_gradients(self, k, v, at, fresh)
    answers = keys.answers
    if self.solve and chunk is None:
      moved = self.curvature * prior.mix * gram(keys.features, keys.features, dtype)
      answers = solve(keys.scale * moved, answers)
    elif self.solve:
      earlier = chunk.solving
      moved = self.curvature * earlier.mix[..., None, :] * gram(keys.features, earlier.features, dtype)
      answers -= keys.scale * product(moved, earlier.answers, moved.dtype)
    inputs, errors = keys.pull(answers)
    online = Online(start, fresh, seen, c, inputs, errors, Solved(keys.features, answers))
    memory, momentum = chunks.write_state(online, dtype)
    tail = tuple(chunks.last_keys(x, self.window - 1, seen) for x in (k, v)) if self.window > 1 else None
    return State(memory, momentum if self.momentum else None, tail), online

  def _coefficients(
    self, gates: Weights, fresh: Weights, seen: Visible, compute: jnp.dtype
  ) -> tuple[dict[str, chunks.Coefficients], chunks.Prior | None]:
    """Of each layer; of a rule that solves, the last layer's of the tokens before as well."""
    gates = {name: gates[name].astype(state_dtype(compute)) for name in self.gates}
    alpha, beta, steps = gates.get("alpha"), gates.get("beta"), tuple(gates[name] for name in self.steps)
    at_once = chunks.at_once(steps[0], seen) if self.normalized else None
    if self.normalized and self.momentum:  # an average of steps, whatever its horizon
      steps = (steps[0] * (1.0 - beta),)
    regains = self.normalized and self.retention and self.learned_init
    own = chunks.coefficients(alpha, beta, steps, seen, compute, regains=regains)
    c = dict.fromkeys(fresh, own)
    if self.normalized:
      c = dict.fromkeys(fresh, at_once) | {networks.last(self.network, fresh): own}
    return c, chunks.prior(own, alpha, seen) if self.solve else None

  def begin(self, state: State, tokens: int, dtype: jnp.dtype) -> "Chunk":
    """An empty chunk, see `Rule.begin`."""
    if not self.solve:
      return Chunk(state.memory, None)
    last = networks.last(self.network, state.memory)

    def empty(*width):
      return jnp.zeros((*state.memory[last].shape[:-2], tokens, *width), state_dtype(dtype))

    momentum = state.momentum[last] if self.momentum else None
    features, answer = state.memory[last].shape[-2:]
    accumulated = empty() if self.momentum else None
    return Chunk(state.memory, Solving(momentum, empty(features), empty(answer), empty(), accumulated))

  def within(self, online: Online) -> "Chunk":
    """What the next token depends on, see `Rule.within`."""
    start = online.start
    if not self.solve:
      return Chunk(start.memory, None)
    last = networks.last(self.network, online.fresh)
    c, before = online.coefficients[last], start.memory[last]
    if self.retention:
      before = c.decay[..., -1, None, None] * before
    if c.regained is not None:
      before += c.regained[..., -1, None, None] * online.fresh[last]
    momentum = None
    if self.momentum:
      before += c.carry[..., -1, None, None] * start.momentum[last]
      momentum = c.kept[..., -1, None, None] * start.momentum[last]
    solving = Solving(momentum, *online.rest, c.mix[..., -1, :], c.momentum)
    return Chunk(start.memory | {last: before}, solving)

  def advance(self, chunk: "Chunk", place: jax.Array, online: Online, gates: Weights) -> "Chunk":
    """The chunk after one more token, see `Rule.advance`."""
    if not self.solve:
      return chunk
    before, last = chunk.solving, networks.last(self.network, online.fresh)
    gates = {name: gate.astype(before.mix.dtype) for name, gate in gates.items()}
    here = (jnp.arange(before.mix.shape[-1]) == place[:, None])[:, None]
    own = online.coefficients[last].mix[..., 0, :]  # of the token's own write
    memory, momentum, mix, accumulated = chunk.memory[last], before.momentum, before.mix, before.accumulated
    if self.retention:
      memory, mix = gates["alpha"][..., None] * memory, gates["alpha"] * mix
    if online.coefficients[last].regained is not None:
      memory += (1.0 - gates["alpha"][..., None]) * online.fresh[last]
    if self.momentum:
      momentum, accumulated = gates["beta"][..., None] * momentum, gates["beta"] * accumulated
      memory, mix = memory + momentum, mix + accumulated
      accumulated = jnp.where(here, own, accumulated)
    solving = Solving(
      momentum,
      jnp.where(here[..., None], online.rest.features, before.features),
      jnp.where(here[..., None], online.rest.answers, before.answers),
      jnp.where(here, own, mix),
      accumulated,
    )
    return Chunk(chunk.memory | {last: memory}, solving)

  def decay(self, gates: Weights, dtype: jnp.dtype) -> jax.Array:
    """The product of alpha, see `Rule.decay`."""
    if not self.retention:
      return jnp.ones((1, 1, 1, 1), dtype)
    return arithmetic.total(gates["alpha"].astype(dtype))[..., None, None]

  def token_start(self, fresh: Weights) -> "TokenState":
    """See `Rule.token_start`."""
    nothing = jax.tree.map(jnp.zeros_like, fresh)
    window = ()
    if self.window > 1:
      first = next(iter(fresh.values()))
      widths = len(first), networks.value_dim(self.network, fresh, len(first))
      window = (tuple(jnp.zeros(width, first.dtype) for width in widths),) * (self.window - 1)
    state = TokenState(fresh, nothing, window, None)
    return state._replace(chunk=self._token_chunk(state))

  def token(
    self, state: "TokenState", fresh: Weights, k: jax.Array, v: jax.Array, gates: Weights, chunk_begins: jax.Array
  ) -> "TokenState":
    """(M_{t-1}, S_{t-1}) to (M_t, S_t), see `Rule.token` (Eq. 2, 26-36).

    Normalized momentum averages, its steps are multiplied by 1 - beta_t; its retention is towards M_0, M_t = M_0 +
    alpha_t (M_{t-1} - M_0) + S_t; and below the last layer it has neither.
    """
    chunk = jax.tree.map(lambda new, old: jnp.where(chunk_begins, new, old), self._token_chunk(state), state.chunk)
    window = ((k, v), *state.window)
    if self.solve:
      gradient, chunk = _solved_gradient(self, fresh, chunk, k, v, gates)
      gradients = [gradient]
    else:
      gradients = [_gradient(self, chunk, *pair) for pair in window]
    last, memory, momentum = networks.last(self.network, fresh), {}, {}
    for name in fresh:
      whole = name == last or not self.normalized
      beta = gates["beta"] if self.momentum and whole else 0.0
      alpha = gates["alpha"] if self.retention and whole else 1.0
      steps = jnp.zeros_like(fresh[name])
      for i, gradient in enumerate(gradients):
        eta = gates[self.steps[i]] if self.step else 1.0
        steps -= eta * (1 - beta if self.normalized else 1.0) * gradient[name]
      momentum[name] = beta * state.momentum[name] + steps
      memory[name] = alpha * state.memory[name] + momentum[name]
      if self.normalized:
        memory[name] += (1 - alpha) * fresh[name]
    return TokenState(memory, momentum, window[: self.window - 1], chunk)

  def _token_chunk(self, state):
    """Where inner gradients are taken in a chunk that begins with a state."""
    if not self.solve:
      return state.memory
    last = networks.last(self.network, state.memory)
    width, out = state.memory[last].shape
    dtype, number = state.memory[last].dtype, jnp.zeros((), jnp.int32)
    weights = jnp.zeros(self.chunk, dtype)
    features, errors = jnp.zeros((self.chunk, width), dtype), jnp.zeros((self.chunk, out), dtype)
    return TokenChunk(state.memory, state.momentum[last], number, features, errors, weights, weights)


def linear(*, chunk: int = 64) -> GradientRule:
  """Linear attention, M_t = M_{t-1} + v_t k_t^T (arXiv:2602.24281, Eq. 2, 12)."""
  return GradientRule("linear", networks.Matrix(), dot_loss, chunk, step=False, learned_init=False)


def swla(*, chunk: int = 64, window: int = 2, max_step: float | None = None) -> GradientRule:
  """Sliding-window linear attention (arXiv:2602.24281, Eq. 26-29), of window c >= 2.

  M_t = alpha_t M_{t-1} + sum_{i < c} eta^(i)_t v_{t-i} k_{t-i}^T; the paper's c = 2 calls eta1 beta and eta0 lambda.
  """
  if window < 2:
    raise ValueError(f"window must be at least 2 tokens for swla, got {window} (1 is rule 'linear')")
  return GradientRule(
    "swla",
    networks.Matrix(),
    dot_loss,
    chunk,
    retention=True,
    window=window,
    max_step=max_step,
    learned_init=False,
  )


def dla(
  *,
  chunk: int = 64,
  depth: int = 2,
  expansion: int = 4,
  norm: bool = False,
  retention: bool = True,
  normalized: bool = True,
  max_grad_norm: float | Literal["default"] | None = "default",
  max_step: float | None = None,
) -> GradientRule:
  """Deep linear attention, M_t = M_{t-1} - eta_t grad L (arXiv:2602.24281, Eq. 30-33).

  Bounded by default: the printed form climbs an unbounded loss over two layers and diverges, see the module's text.

  Args:
    chunk: Tokens written at once.
    depth, expansion, norm: The network's, see networks.MLP.
    retention: Whether the memory decays; False is the printed form.
    normalized: Steps are shares of a token's value, see `GradientRule`; M_0 is at the scale of unit keys.
    max_grad_norm: Clips inner gradients; "default": at 1, and not at all if normalized.
    max_step: The largest step size; None: see `GradientRule.gate_init`.
  """
  return GradientRule(
    "dla",
    networks.MLP(depth, expansion, norm, unit_keys=normalized),
    dot_loss,
    chunk,
    retention=retention,
    normalized=normalized,
    max_grad_norm=_clip(max_grad_norm, normalized, 1.0),
    max_step=max_step,
  )


def titans(
  *,
  chunk: int = 64,
  depth: int = 2,
  expansion: int = 4,
  norm: bool = False,
  normalized: bool = True,
  solve: bool | None = None,
  max_grad_norm: float | Literal["default"] | None = "default",
  max_step: float | None = None,
) -> GradientRule:
  """Titans: momentum, retention, squared loss (arXiv:2602.24281, Eq. 34-36; signs descend, as arXiv:2501.00663 has it).

  S_t = beta_t S_{t-1} - eta_t grad L, M_t = alpha_t M_{t-1} + S_t.

  Args:
    chunk: Tokens written at once.
    depth, expansion, norm: The network's, see networks.MLP.
    normalized: Steps are shares of a token's error and momentum is their average, see `GradientRule`; M_0 is at the
      scale of unit keys.
    solve: With normalized, take errors at the state before each token instead of before its chunk, see `GradientRule`;
      None: as normalized.
    max_grad_norm: Clips inner gradients; "default": at 4, and not at all if normalized.
    max_step: The largest step size; None: see `GradientRule.gate_init`.
  """
  return GradientRule(
    "titans",
    networks.MLP(depth, expansion, norm, unit_keys=normalized),
    squared_loss,
    chunk,
    retention=True,
    momentum=True,
    normalized=normalized,
    solve=normalized if solve is None else solve,
    max_grad_norm=_clip(max_grad_norm, normalized, 4.0),
    max_step=max_step,
  )


def _clip(norm: float | Literal["default"] | None, normalized: bool, printed: float) -> float | None:
  """max_grad_norm, whose default is that of the printed form, and none of the normalized."""
  if norm != "default":
    return norm
  return None if normalized else printed


class Solved(NamedTuple):
  """A chunk's tokens, for the next tokens of the chunk: features [..., J, in], see `Keys`; what each has written,
  answers [..., J, value_dim], delta of the network's answers in steps."""

  features: jax.Array | None
  answers: jax.Array


class Keys(NamedTuple):
  """The inner gradients of keys.

  Attributes:
    features: the last layer's input z, times the gain of the answer in its output, [..., J, in]; None if not
      normalized. The gain is the length of the gradient of <p, M(k)>, p = (1, -1, 1, ...) / |p|: 1 unless a norm
      follows the layer.
    answers: the loss's gradient in the network's answer M(k), times `scale`, [..., J, value_dim].
    scale: [..., J, 1], what makes a step of 1 remove all of a key's error, as far as the last layer goes; less where
      a norm makes the answer's gain smaller than 1, or steps would grow with the weights, and where features are
      smaller than the network's `least_features`. None where steps are multiples of the gradient.
    pull: (answers) to each layer's input z, {name: [..., J, in]}, times f, and its error delta, {name: [..., J, out]}.
  """

  features: jax.Array | None
  answers: jax.Array
  scale: jax.Array | None
  pull: Callable[[jax.Array], tuple[Weights, Weights]]


def key_gradients(rule: GradientRule, k: jax.Array, v: jax.Array, linear: Linear, weights: Weights) -> Keys:
  """Every key's inner gradient: in weights `name` it is z_j (x) delta_j.

  The errors are gradients in a zero added to each layer's output, so that no network needs a backward pass of its own.
  `linear` reads the state that they are taken at, `weights` gives the layers' widths.
  """
  wide = state_dtype(k.dtype)

  def answer(bumps):
    inputs = {}

    def bumped(name, x):
      inputs[name] = x.astype(k.dtype)
      return linear(name, x) + bumps[name]

    return rule.network(k, bumped), inputs

  bumps = {name: jnp.zeros((*k.shape[:-1], w.shape[-1]), wide) for name, w in weights.items()}
  y, back, inputs = jax.vjp(answer, bumps, has_aux=True)
  answers = jax.grad(lambda y: rule.loss(y, v).sum())(y)
  features = scale = None
  if rule.normalized:
    last = networks.last(rule.network, weights)
    features = inputs[last].astype(wide)
    own = jnp.maximum(square(features), rule.network.least_features * features.shape[-1])
    if not _unchanged(lambda answers: back(answers)[0][last], y):
      signs = 1 - 2 * (jax.lax.broadcasted_iota(jnp.int32, y.shape, y.ndim - 1) % 2)
      gain = square(back(signs.astype(y.dtype) * y.shape[-1] ** -0.5)[0][last])
      features *= jnp.sqrt(jnp.maximum(gain, _LEAST_GAIN))
      own *= jnp.maximum(gain, 1.0)
    scale = 1.0 / (max(rule.curvature, 1.0) * own + _TINY)
    answers = scale * answers

  def pull(answers):
    (errors,) = back(answers.astype(y.dtype))
    if rule.max_grad_norm is None and not (rule.normalized and len(errors) > 1):
      return inputs, errors
    # Squared Frobenius norms of z (x) delta: also what a step along it removes of the key's own error.
    squares = {name: square(inputs[name].astype(wide)) * square(error) for name, error in errors.items()}
    if rule.max_grad_norm is not None:
      norm = jnp.maximum(sum(squares.values()), rule.max_grad_norm**2)
      return inputs, {name: rule.max_grad_norm * jax.lax.rsqrt(norm) * error for name, error in errors.items()}
    at_most = rule.frozen_share * squares.pop(last) + _NOTHING
    share = at_most / jnp.maximum(sum(squares.values()), at_most)
    return inputs | {name: share * inputs[name] for name in squares}, errors

  return Keys(features, answers, scale, pull)


def _unchanged(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> bool:
  """Whether the function gives back what it is given, whatever that is."""
  jaxpr = jax.make_jaxpr(function)(x).jaxpr
  return jaxpr.outvars == jaxpr.invars


class TokenState(NamedTuple):
  """What one sequence and head carries from token to token in the printed recurrence.

  Attributes:
    memory, momentum: M and S, {name: [in, out]}.
    window: (k, v) of the last window - 1 tokens, the latest first; zeros where there is none.
    chunk: where inner gradients are taken, {name: [in, out]}; of a rule that solves, a TokenChunk.
  """

  memory: Weights
  momentum: Weights
  window: tuple[tuple[jax.Array, jax.Array], ...]
  chunk: "Weights | TokenChunk"


class TokenChunk(NamedTuple):
  """The tokens of a chunk so far, of a rule that solves.

  Attributes:
    memory: the state before the chunk; its last layer as it would be now, had the chunk written nothing.
    momentum: the same of the last layer's.
    tokens: how many there were.
    feature: [chunk, in], the last layer's input times its gain.
    error: [chunk, value_dim], what each token wrote: a multiple of the loss's gradient in M(k).
    weight, accumulated: [chunk], how much of that M and S hold.
  """

  memory: Weights
  momentum: jax.Array
  tokens: jax.Array
  feature: jax.Array
  error: jax.Array
  weight: jax.Array
  accumulated: jax.Array


def _solved_gradient(rule, init, chunk, k, v, gates):
  """(the gradient of a token's loss at M_{t-1}, in units of the error; the chunk after it).

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
  accumulated = (beta * chunk.accumulated).at[chunk.tokens].set(step)
  memory = chunk.memory | {last: init[last] + alpha * (chunk.memory[last] - init[last]) + momentum}
  return gradient, TokenChunk(
    memory,
    momentum,
    chunk.tokens + 1,
    chunk.feature.at[chunk.tokens].set(feature),
    chunk.error.at[chunk.tokens].set(error),
    alpha * chunk.weight + accumulated,
    accumulated,
  )


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

  def along(bump):
    y, z = answer(bump)
    signs = (1 - 2 * (jnp.arange(len(y)) % 2)) / jnp.sqrt(len(y))
    return jnp.dot(signs, y), z

  gain, z = jax.grad(along, has_aux=True)(jnp.zeros(weights[last].shape[-1], k.dtype))
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


def _read(network, weights, x):
  """M(x), x [head_dim], in full precision on machines whose default is less."""
  return network(x, lambda name, z: jnp.matmul(z, weights[name], precision=jax.lax.Precision.HIGHEST))


def _select(condition, a, b):
  """The tree a where the scalar condition holds, else b."""
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
