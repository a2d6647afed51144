"""Memory rules: how a memory writes (arXiv:2602.24281, section 4.3).

A rule is three choices: the memory's network, the inner loss, the inner optimiser. The optimiser is one recurrence, of
which every rule switches parts on:

  S_t = beta_t S_{t-1} - sum_{i < window} eta^(i)_t grad L(M; k_{t-i}, v_{t-i})   momentum; without it, just the step
  M_t = alpha_t M_{t-1} + S_t                                                     retention; without it, alpha = 1

| rule   | network | inner loss     | alpha | beta | eta          | equations |
|--------|---------|----------------|-------|------|--------------|-----------|
| linear | matrix  | -<M(k), v>     |       |      | 1            | 2, 12     |
| swla   | matrix  | -<M(k), v>     | yes   |      | window gates | 26-29     |
| dla    | MLP     | -<M(k), v>     | yes * |      | a gate       | 30-33     |
| titans | MLP     | ||M(k) - v||^2 | yes   | yes  | a gate       | 34-36     |

(*) not in the paper: dla as printed climbs an unbounded loss without retention, and diverges.
`get("dla", retention=False, max_grad_norm=None)` is the printed form.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from mc_jax.memory import networks

# Segments in which retention alone, at its start, takes a memory down to 1 / e.
_LIFETIME = 16

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def dot_loss(y: jax.Array, v: jax.Array) -> jax.Array:
  """-<y, v> over the last axis: [..., d], [..., d] to [...]. Matrix memory: Hebbian (arXiv:2602.24281, Eq. 2, 30)."""
  return -(y * v).sum(-1)


def squared_loss(y: jax.Array, v: jax.Array) -> jax.Array:
  """||y - v||^2 over the last axis, summed and without a half (arXiv:2602.24281, Eq. 34-35)."""
  return jnp.square(y - v).sum(-1)


@dataclasses.dataclass(frozen=True)
class GateInit:
  """Where a gate starts: value = maximum * sigmoid(logit), logit = <x_t, w> + bias."""

  bias: float
  maximum: float = 1.0


@dataclasses.dataclass(frozen=True)
class Rule:
  """A memory-update rule. Hashable, static under jit; make one with `get`, or directly for a rule of your own.

  Attributes:
    name: what errors call it.
    network: M, see networks.py.
    loss: inner loss of (M(k) [..., d], v [..., d]) to [...].
    retention: M decays by alpha_t each token.
    momentum: steps accumulate in S, which decays by beta_t.
    normalized: steps are in units of the error. A gradient is divided by what a step of 1 along it would remove of its
      own token's error, to first order (a dot loss: would write of its own value), so that eta is the share that a
      write removes; momentum averages the steps, S_t = beta_t S_{t-1} - (1 - beta_t) eta_t G_t; and what fades makes
      way for M_0, M_t = M_0 + alpha_t (M_{t-1} - M_0) + S_t. All this is the network's last layer's, which stores; the
      layers below, which make its features, take their steps at once and keep them, and write at most `frozen_share` of
      what the last layer does.
    solve: of a normalized squared loss: a token's error is taken at the state before the token, to first order in what
      its chunk has written (online.py), instead of at the state before the chunk, so that chunks do not overshoot.
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
  def gates(self) -> tuple[str, ...]:
    """Names of the per-token scalars that the rule needs, each [batch, length, heads]."""
    return ("alpha",) * self.retention + ("beta",) * self.momentum + self.steps

  @property
  def curvature(self) -> float:
    """The loss's second derivative in the answer: 2 of the squared loss, 0 of the dot loss."""
    return 2.0 if self.loss is squared_loss else 0.0

  @property
  def affine(self) -> bool:
    """Whether a state is a multiple of an earlier one plus what was written since, whatever the earlier one was."""
    gradient_of_state = self.loss is not dot_loss or not isinstance(self.network, networks.Matrix)
    return not (gradient_of_state or self.momentum or self.max_grad_norm is not None)

  @property
  def frozen_share(self) -> float:
    """The share of their own errors that writes may remove, if a chunk's are all taken at the state before it.

    1 over the largest eigenvalue of their keys' Gram matrix, above which they overshoot: of unit keys after a SiLU it
    is near 0.12 a key.
    """
    return 1 / (0.12 * self.chunk + 1.5)

  def init(self, key: jax.Array, *, heads: int, head_dim: int) -> networks.Weights:
    """M_0: {name: [heads, in, out]} float32."""
    return self.network.init(key, heads, head_dim)

  def gate_init(self, segment_length: int) -> dict[str, GateInit]:
    """Where the gates start, chosen so that no memory dies or blows up.

    alpha: 1 - 1 / (16 segment_length). As printed, retention pulls a network towards zero, and a network of zeros
      cannot learn: at 1 - 1 / segment_length a memory that is carried on had died after some twenty segments, whatever
      its depth, for what it writes in a token is worth no more than that decay (tests/memory/stability_test.py).
    beta: 0.9; of normalized steps an average over an eighth of the segment, and at least over a token.
    Step sizes: half their maximum, which is max_step or what `_max_step` has.
    """
    beta = 1 - min(0.95, max(0.1, 8 / segment_length)) if self.normalized else 0.9
    max_step = self._max_step(segment_length, beta) if self.max_step is None else self.max_step
    starts = {name: GateInit(0.0, max_step) for name in self.steps}
    if self.retention:
      starts["alpha"] = GateInit(math.log(_LIFETIME * segment_length - 1))
    if self.momentum:
      starts["beta"] = GateInit(math.log(beta / (1 - beta)))
    return {name: starts[name] for name in self.gates}

  def _max_step(self, segment_length: int, beta: float) -> float:
    """The largest step size where none is given, beta being the momentum at its start."""
    if not self.normalized:
      return ((1 - beta) if self.momentum else 1.0) / self.chunk if self.learned_init else 1.0
    if self.solve:
      return 1.5
    # A dot loss never corrects itself: over a segment as frozen gradients over a chunk.
    return self.frozen_share if self.curvature else 2 / (0.1 * segment_length + 1)

  def starting_gates(self, segment_length: int) -> dict[str, float]:
    """The value that each gate starts at, {name: value}, in the order of `gates`; segment_length in tokens."""
    return {name: start.maximum / (1 + math.exp(-start.bias)) for name, start in self.gate_init(segment_length).items()}


def linear(*, chunk: int = 64) -> Rule:
  """Linear attention, M_t = M_{t-1} + v_t k_t^T (arXiv:2602.24281, Eq. 2, 12)."""
  return Rule("linear", networks.Matrix(), dot_loss, chunk, step=False, learned_init=False)


def swla(*, chunk: int = 64, window: int = 2, max_step: float | None = None) -> Rule:
  """Sliding-window linear attention (arXiv:2602.24281, Eq. 26-29), of window c >= 2.

  M_t = alpha_t M_{t-1} + sum_{i < c} eta^(i)_t v_{t-i} k_{t-i}^T; the paper's c = 2 calls eta1 beta and eta0 lambda.
  """
  if window < 2:
    raise ValueError(f"window must be at least 2 tokens for swla, got {window} (1 is rule 'linear')")
  return Rule(
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
) -> Rule:
  """Deep linear attention, M_t = M_{t-1} - eta_t grad L (arXiv:2602.24281, Eq. 30-33).

  Bounded by default: the printed form climbs an unbounded loss over two layers and diverges, see the module's text.

  Args:
    chunk: Tokens written at once.
    depth, expansion, norm: The network's, see networks.MLP.
    retention: Whether the memory decays; False is the printed form.
    normalized: Steps are shares of a token's value, see `Rule`; M_0 is at the scale of unit keys.
    max_grad_norm: Clips inner gradients; "default": at 1, and not at all if normalized.
    max_step: The largest step size; None: see `Rule.gate_init`.
  """
  return Rule(
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
) -> Rule:
  """Titans: momentum, retention, squared loss (arXiv:2602.24281, Eq. 34-36; signs descend, as arXiv:2501.00663 has it).

  S_t = beta_t S_{t-1} - eta_t grad L, M_t = alpha_t M_{t-1} + S_t.

  Args:
    chunk: Tokens written at once.
    depth, expansion, norm: The network's, see networks.MLP.
    normalized: Steps are shares of a token's error and momentum is their average, see `Rule`; M_0 is at the scale of
      unit keys.
    solve: With normalized, take errors at the state before each token instead of before its chunk, see `Rule`; None: as
      normalized.
    max_grad_norm: Clips inner gradients; "default": at 4, and not at all if normalized.
    max_step: The largest step size; None: see `Rule.gate_init`.
  """
  return Rule(
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


_RULES: dict[str, Callable[..., Rule]] = {"linear": linear, "swla": swla, "dla": dla, "titans": titans}
NAMES = tuple(_RULES)


def options(name: str) -> tuple[str, ...]:
  """The options that `get(name, ...)` takes."""
  if name not in _RULES:
    raise ValueError(f"rule must be one of {', '.join(NAMES)}; got {name!r}")
  return tuple(_RULES[name].__kwdefaults__)


def get(name: str, **opts) -> Rule:
  """The rule called `name`, with options such as chunk=64, expansion=4.

  Raises:
    ValueError: no such rule, or an option that it does not take; the message lists the valid ones.
  """
  unknown = sorted(set(opts) - set(options(name)))
  if unknown:
    raise ValueError(f"rule {name!r} takes {', '.join(options(name))}; got {', '.join(unknown)}")
  return _RULES[name](**opts)
