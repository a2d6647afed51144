"""How published models make a rule's gates from tokens: records of what they do, each of which builds its module.

`token_gates.py` is the parametrisation for gates that have none here. Everything is computed in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax.models.linear import Linear, LowRank, parameter
from mc_jax.parallel import axes

# Standard deviation of logits when training begins: PyTorch's default linear maps, of inputs of unit variance.
SPREAD = 3**-0.5

STEPS = (0.001, 0.1)  # the range of dt when training begins, uniform in its logarithm
_LEAST_RATE = 1e-4  # a rate's logarithm must be finite


class Sizes(NamedTuple):
  """What a module of gates is built for.

  Attributes:
    d_model: of the tokens.
    heads: memories.
    head_dim: key channels of a memory.
    per_channel: whether the rule's gate is one for each key channel.
    maximum: of the gate, see `rules.GateInit`.
  """

  d_model: int
  heads: int
  head_dim: int
  per_channel: bool
  maximum: float

  @property
  def outputs(self) -> dict[str, int]:
    """Names and sizes of the gate's axes. Those by head are few, and whole on every device: see `TokenGates`."""
    return {"heads": self.heads, "head_dim": self.head_dim} if self.per_channel else {"gate_heads": self.heads}


class Parametrisation(Protocol):
  """A frozen dataclass: how one gate is made, and perhaps a second one with it.

  Attributes:
    gate: the gate's name; the module's parameters are called by it.
    makes: this gate and those that come with it.
    bounded: the rule's maximum bounds the gate.
  """

  gate: str

  @property
  def bounded(self) -> bool:
    """See above."""

  @property
  def makes(self) -> tuple[str, ...]:
    """See above."""

  def build(self, sizes: Sizes, *, rngs: nnx.Rngs) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """The module: x [batch, length, d_model] to {gate: [batch, length, heads] or [..., head_dim]} float32."""


def _linear(sizes: Sizes, rank: int | Literal["head"] | None, spread: float, rngs: nnx.Rngs) -> Linear | LowRank:
  """x W: one linear map, or two through a narrow layer."""
  inputs = {"embed": sizes.d_model}
  if rank is None:
    return Linear(inputs, sizes.outputs, scale=spread, rngs=rngs)
  return LowRank(inputs, sizes.head_dim if rank == "head" else rank, sizes.outputs, scale=spread, rngs=rngs)


def _laid_out(logits: jax.Array) -> jax.Array:
  """Logits by head [batch, length, heads] on every device, those by channel [..., head_dim] with their heads."""
  return axes.constrain(logits, axes.HEADS if logits.ndim == 4 else (*axes.TOKENS, None))


@dataclasses.dataclass(frozen=True)
class Activated:
  """maximum * f(cap tanh((x W + b) / cap))^power.

  Attributes:
    gate: its name.
    activation: f, sigmoid or exp. The rule's maximum is a sigmoid's.
    power: of the activation.
    cap: bounds the logits softly; None: nothing does.
    bias: where b starts, in the first head and in the last, and evenly in between; None: there is no b.
    rank: of W; "head": head_dim; None: full.
    spread: standard deviation of the logits when training begins.
  """

  gate: str
  activation: Literal["sigmoid", "exp"] = "sigmoid"
  power: float = 1.0
  cap: float | None = None
  bias: tuple[float, float] | None = None
  rank: int | Literal["head"] | None = None
  spread: float = SPREAD

  @property
  def makes(self) -> tuple[str, ...]:
    """See `Parametrisation`."""
    return (self.gate,)

  @property
  def bounded(self) -> bool:
    """See `Parametrisation`."""
    return self.activation == "sigmoid"

  def build(self, sizes: Sizes, *, rngs: nnx.Rngs) -> ActivatedGate:
    """See `Parametrisation`."""
    return ActivatedGate(self, sizes, rngs=rngs)


class ActivatedGate(nnx.Module):
  """The module of `Activated`."""

  def __init__(self, how: Activated, sizes: Sizes, *, rngs: nnx.Rngs):
    self.how = how
    self.maximum = sizes.maximum if how.bounded else 1.0
    self.linear = _linear(sizes, how.rank, how.spread, rngs)
    if how.bias is not None:
      by_head = jnp.linspace(*how.bias, sizes.heads)
      shape = tuple(sizes.outputs.values())
      start = jnp.broadcast_to(by_head.reshape(-1, *[1] * (len(shape) - 1)), shape)
      self.bias = parameter(lambda *_: start, shape, sizes.outputs, rngs)

  def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
    how, logits = self.how, _laid_out(self.linear(x))
    if how.bias is not None:
      logits += self.bias[...]
    if how.cap is not None:
      logits = how.cap * jnp.tanh(logits / how.cap)
    if how.activation == "exp":
      return {how.gate: jnp.exp(how.power * logits)}
    value = jax.nn.sigmoid(logits) if how.power == 1 else jnp.exp(how.power * jax.nn.log_sigmoid(logits))
    return {how.gate: self.maximum * value}


@dataclasses.dataclass(frozen=True)
class Decay:
  """exp(-A dt), dt = softplus(x W + b): A > 0 a learned number for each head, b one for each output.

  Mamba's discretisation (arXiv:2405.21060), which gated DeltaNet and KDA took over.

  Attributes:
    gate: its name.
    step: the gate that is dt itself, if the rule has one; None: there is none.
    rates: A when training begins, uniform between these.
    rank: of W; "head": head_dim; None: full.
  """

  gate: str = "alpha"
  step: str | None = None
  rates: tuple[float, float] = (1.0, 16.0)
  rank: int | Literal["head"] | None = None

  bounded = False

  @property
  def makes(self) -> tuple[str, ...]:
    """See `Parametrisation`."""
    return (self.gate,) if self.step is None else (self.gate, self.step)

  def build(self, sizes: Sizes, *, rngs: nnx.Rngs) -> DecayGate:
    """See `Parametrisation`."""
    return DecayGate(self, sizes, rngs=rngs)


class DecayGate(nnx.Module):
  """The module of `Decay`. Its parameters start as published: b is what softplus makes dt in `STEPS` of."""

  def __init__(self, how: Decay, sizes: Sizes, *, rngs: nnx.Rngs):
    self.how = how
    self.per_channel = sizes.per_channel
    self.linear = _linear(sizes, how.rank, SPREAD, rngs)
    self.log_rate = parameter(self._log_rates, (sizes.heads,), ("heads" if sizes.per_channel else "gate_heads",), rngs)
    self.dt_bias = parameter(_dt_bias, tuple(sizes.outputs.values()), sizes.outputs, rngs)

  def _log_rates(self, key, shape, dtype):
    lowest, highest = self.how.rates
    return jnp.log(jax.random.uniform(key, shape, dtype, max(lowest, _LEAST_RATE), highest))

  def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
    dt = jax.nn.softplus(_laid_out(self.linear(x)) + self.dt_bias[...])
    rate = jnp.exp(self.log_rate[...])
    alpha = jnp.exp(-(rate[:, None] if self.per_channel else rate) * dt)
    return dict(zip(self.how.makes, (alpha, dt), strict=False))


def _dt_bias(key, shape, dtype):
  """softplus^-1(dt) of dt log-uniform in STEPS."""
  lowest, highest = map(math.log, STEPS)
  dt = jnp.exp(jax.random.uniform(key, shape, dtype, lowest, highest))
  return dt + jnp.log(-jnp.expm1(-dt))


@dataclasses.dataclass(frozen=True)
class Horizons:
  """1 - 2^(-5 - h) in head h = 0, 1, ...: RetNet's constant decays (arXiv:2307.08621)."""

  gate: str = "alpha"

  bounded = False

  @property
  def makes(self) -> tuple[str, ...]:
    """See `Parametrisation`."""
    return (self.gate,)

  def build(self, sizes: Sizes, *, rngs: nnx.Rngs) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """See `Parametrisation`."""
    del rngs  # there is nothing to learn
    return ConstantGate(self.gate, tuple(1 - 2.0 ** (-5 - h) for h in range(sizes.heads)), sizes)


class ConstantGate(nnx.Module):
  """A number for each head, whatever the token."""

  def __init__(self, gate: str, values: tuple[float, ...], sizes: Sizes):
    self.gate = gate
    self.values = values
    self.outputs = tuple(sizes.outputs.values())

  def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
    values = jnp.asarray(self.values, jnp.float32).reshape(-1, *[1] * (len(self.outputs) - 1))
    return {self.gate: jnp.broadcast_to(values, (*x.shape[:2], *self.outputs))}
