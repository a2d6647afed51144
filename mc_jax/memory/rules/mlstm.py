"""mLSTM: a matrix memory with an exponential input gate, and a normaliser (arXiv:2405.04517).

  W_t = alpha_t W_{t-1} + eta_t k_t (x) v_t,   n_t = alpha_t n_{t-1} + eta_t k_t,   y_t = q_t W_t / max(|q_t n_t|, 1)

alpha is the forget gate, eta the input gate, which may be e^15: so W and n are kept times e^-m_t, with the stabiliser
m_t = max(log alpha_t + m_{t-1}, log eta_t). It changes no answer, and no gradient goes through it. What is cached
beside W and n is the floor e^-m, which the 1 becomes. Over a chunk, with F the cumulative log alpha and
D_tj = F_t - F_j + log eta_j,

  m_t = max(F_t + m_0, max_{j <= t} D_tj),   A_t = e^(F_t + m_0 - m_t),   C_tj = e^(D_tj - m_t)

are the coefficients of chunk.py. A cached memory is normalised by itself when it is read. States have scales of their
own, so that a soup of their weights means nothing.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.memory import arithmetic
from mc_jax.memory import chunk as chunks
from mc_jax.memory.arithmetic import Solve, column, state_dtype
from mc_jax.memory.chunk import State
from mc_jax.memory.documents import Documents, visible
from mc_jax.memory.networks import Linear, Weights
from mc_jax.memory.rules.rule import Gate, GateInit, Rule, retention_init


@dataclasses.dataclass(frozen=True)
class Normalized:
  """M(x) = x W / max(|x n|, floor): weights w [in, out], n [in, 1], floor [1, 1]."""

  least_features = 0.0

  def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
    y, n = linear("w", x), linear("n", x)
    floor = linear("floor", jnp.ones_like(x[..., :1]))
    scale = jnp.maximum(jnp.abs(n), floor)
    return y / jnp.where(scale > 0, scale, 1.0)  # where a memory was cut to zeros it answers 0, and not 0 / 0

  def init(self, key: jax.Array, heads: int, head_dim: int, value_dim: int | None = None) -> Weights:
    """Nothing is held, and m = 0."""
    del key
    return {
      "w": jnp.zeros((heads, head_dim, head_dim if value_dim is None else value_dim), jnp.float32),
      "n": jnp.zeros((heads, head_dim, 1), jnp.float32),
      "floor": jnp.ones((heads, 1, 1), jnp.float32),
    }


class Online(NamedTuple):
  """The online memory of every token of a chunk.

  Attributes:
    sums: of W and n.
    floor: e^-m_t [..., T, 1].
  """

  sums: chunks.Online
  floor: jax.Array

  def read(self, name: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """See `rule.Online`."""
    return x * self.floor if name == "floor" else self.sums.read(name, x, dtype)


@dataclasses.dataclass(frozen=True)
class MLSTM(Rule):
  """The rule "mlstm"; see the module's text.

  Attributes:
    chunk: tokens written at once. It changes no number, only how they are computed.
  """

  chunk: int = 64
  name = "mlstm"
  network = Normalized()
  mixes = False
  transition = "scalar"

  def __post_init__(self):
    if self.chunk < 1:
      raise ValueError(f"chunk must be at least 1 token, got {self.chunk}")

  @property
  def gates(self) -> dict[str, Gate]:
    """The forget gate alpha and the input gate eta, a number a head."""
    return {"alpha": Gate(), "eta": Gate()}

  def init(self, key: jax.Array, *, heads: int, head_dim: int, value_dim: int | None = None) -> Weights:
    """M_0, which holds nothing, see `Normalized`."""
    return self.network.init(key, heads, head_dim, value_dim)

  def gate_init(self, segment_length: int) -> dict[str, GateInit]:
    """Where gates start that are sigmoids; published models have an exponential eta (models/forms.py)."""
    return {"alpha": retention_init(segment_length), "eta": GateInit(0.0)}

  def start(self, fresh: Weights, k: jax.Array) -> State:
    """M_0, see `Rule.start`."""
    return State(chunks.new_memory(fresh, k))

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
    chunk: None = None,
  ) -> tuple[State, Online]:
    """One chunk step, see `Rule.write`."""
    del solve, chunk
    seen, wide = visible(documents, k.shape[-2]), state_dtype(k.dtype)
    forget, let_in = (arithmetic.log(gates[name].astype(wide)) for name in ("alpha", "eta"))
    before = -jnp.log(start.memory["floor"])  # m_0 [..., 1, 1]
    if seen.incoming is not None:
      before = jnp.where(seen.incoming, before, -jnp.log(fresh["floor"]))
    logs = column(arithmetic.masked_sums(seen.same, forget))
    came_in = logs + before  # [..., T, 1]
    own = jnp.where(seen.same, logs - jnp.swapaxes(logs, -1, -2) + let_in[..., None, :], -jnp.inf)
    m = jax.lax.stop_gradient(jnp.maximum(came_in, own.max(-1, keepdims=True)))
    c = chunks.Coefficients(jnp.exp(came_in - m)[..., 0], None, None, jnp.exp(own - m), None, None)
    ones = jnp.ones_like(v[..., :1])
    sums = chunks.Online(start, fresh, seen, {"w": c, "n": c}, {"w": k, "n": k}, {"w": -v, "n": -ones})
    online = Online(sums, jnp.exp(-m))
    memory, _ = chunks.write_state(sums, k.dtype)
    return State(memory | {"floor": online.floor[..., -1:, :]}), online

  def empty(self, memory: Weights) -> Weights:
    """Nothing is held, at the scale 1."""
    return {name: jnp.ones_like(w) if name == "floor" else jnp.zeros_like(w) for name, w in memory.items()}

  def decay(self, gates: Weights, dtype: jnp.dtype) -> jax.Array:
    """The product of alpha, see `Rule.decay`."""
    return arithmetic.total(gates["alpha"].astype(dtype))[..., None, None]

  def joined(self, decay: jax.Array, before: Weights, written: Weights) -> Weights:
    """See `Rule.joined`: each is brought to the smaller floor, at the larger scale."""
    kept = decay > 0
    brought = jnp.where(kept, before["floor"] / jnp.where(kept, decay, 1.0), jnp.inf)
    floor = jax.lax.stop_gradient(jnp.minimum(brought, written["floor"]))
    # Not floor / brought: the square of a small decay, which that gradient divides by, is 0 in float32.
    shares = floor * decay / before["floor"], floor / written["floor"]
    sums = {name: jnp.where(kept, shares[0] * before[name], 0.0) + shares[1] * written[name] for name in ("w", "n")}
    return sums | {"floor": floor}

  def token_start(self, fresh: Weights) -> State:
    """See `Rule.token_start`."""
    return State(fresh)

  def token(
    self, state: State, fresh: Weights, k: jax.Array, v: jax.Array, gates: Weights, chunk_begins: jax.Array
  ) -> State:
    """(W_{t-1}, n_{t-1}, e^-m_{t-1}) to those of t."""
    del fresh, chunk_begins
    memory, forget, let_in = state.memory, jnp.log(gates["alpha"]), jnp.log(gates["eta"])
    kept = forget - jnp.log(memory["floor"])
    m = jnp.maximum(kept, let_in)
    f, i = jnp.exp(kept - m), jnp.exp(let_in - m)
    return State(
      {
        "w": f * memory["w"] + i * jnp.outer(k, v),
        "n": f * memory["n"] + i * k[:, None],
        "floor": jnp.exp(-m),
      }
    )


def mlstm(*, chunk: int = 64) -> MLSTM:
  """mLSTM (arXiv:2405.04517), see the module's text."""
  return MLSTM(chunk)
