"""Matrix memories that decay, and correct what they hold: from RetNet to gated DeltaNet, KDA and RWKV-7.

All of them are one recurrence, of which each has parts; W [in, out] is read x W, k_t (x) v_t is an outer product:

  S_t = beta_t S_{t-1} - eta_t k_t (x) delta_t      momentum; without it, just the step
  W_t = a_t o W_{t-1} + S_t                         a_t: a number a head, or one for each key channel (a row of W)

  delta_t = -v_t                                    Hebbian: RetNet, Mamba-2, GLA
  delta_t = g (k_t W^_t - v_t)                      the delta rule: W^_t is W_{t-1}, or a_t o W_{t-1}, decay first

None of it is frozen: a token's error is that of the state just before the token, whatever the chunk's length. With the
chunk's coefficients A, c, C (chunk.py) and those of W^_t, which are A', c', C' (C' strictly lower triangular), the
errors of a chunk's tokens are one unit lower triangular system,

  (I + g N) delta = g (R - V),   R_t = A'_t k_t W_0 + c'_t k_t S_0,   N_tj = C'_tj <k_t, k_j>.

With a decay for each channel, C_tj <x_t, k_j> becomes <x_t o e^(L_t - L_j), eta_j k_j>, L the cumulative log decay
(`Channels`). A rule may also look up by one key, erase by another and write by a third (RWKV-7, gated DeltaNet 2),

  W_t = a_t o W_{t-1} - b_t (x) (e_t W^_t) + z_t (x) v_t:   (I + N^b) U = R + N^z V,   N^x_tj = C'_tj <e_t, x_j>.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.memory import arithmetic, networks
from mc_jax.memory import chunk as chunks
from mc_jax.memory.arithmetic import Solve, column, gram, product, state_dtype
from mc_jax.memory.chunk import State
from mc_jax.memory.documents import Documents, Visible, earlier, visible
from mc_jax.memory.networks import Weights
from mc_jax.memory.rules.rule import Gate, GateInit, Rule, momentum_init, retention_init

# Decays for each channel below e^-11 a token count as e^-11, 1.7e-5 of what was there: quotients of decays over a block
# of 8 tokens, e^77 at most, are then float32 numbers.
_LEAST_LOG = -11.0
_BLOCK = 8


class TokenState(NamedTuple):
  """What one sequence and head carries from token to token: M and S {"w": [in, out]}."""

  memory: Weights
  momentum: Weights


@dataclasses.dataclass(frozen=True)
class MatrixRule(Rule):
  """A matrix with decay, momentum and the delta rule, as far as it has them; make one with `rules.get`.

  Attributes:
    name: what errors call it.
    chunk: tokens written at once. It changes no number, only how they are computed.
    decays: "head" or "channel": alpha is a number a head or one for each key channel. None: nothing fades.
    decay_first: errors are taken after the decay (gated DeltaNet, KDA), not before (Titans, RWKV-7).
    curvature: g, the factor of the error: 1, or 2 of the squared loss without a half (Titans). 0: there is no error,
      values are written as they are.
    momentum: steps accumulate in S, which decays by beta. Not with decays "channel", nor with decay_first.
    step: whether there are step sizes eta, "head" or "channel"; None: 1.
    erases: what eta is, if it is "channel": None: of what is written; "read": the key looks up through eta o k (gated
      DeltaNet 2); "erase": eta o k is erased, and a gate `write` o k written (RWKV-7).
    max_step: the largest eta; None: 1. Of the delta rule with unit keys, above 1 eigenvalues of the transition are
      negative, down to 1 - max_step.
    learned_init: M_0 is a learned parameter, which starts at 0; if not, it is 0.
  """

  name: str
  chunk: int = 64
  decays: Literal["head", "channel"] | None = None
  decay_first: bool = True
  curvature: float = 0.0
  momentum: bool = False
  step: Literal["head", "channel"] | None = "head"
  erases: Literal["read", "erase"] | None = None
  max_step: float | None = None
  learned_init: bool = False
  network = networks.Matrix()

  def __post_init__(self):
    if self.chunk < 1:
      raise ValueError(f"chunk must be at least 1 token, got {self.chunk}")
    if self.max_step is not None and not 0 < self.max_step < math.inf:
      raise ValueError(f"max_step must be positive or None, got {self.max_step}")
    if self.momentum and (self.decays == "channel" or self.decay_first):
      raise ValueError("momentum needs a decay by head, or none, and decay_first=False: steps have a weight in common")
    if self.step == "channel" and self.decays != "channel":
      raise ValueError("step='channel' needs decays='channel'")
    if self.erases and (self.step != "channel" or self.curvature != 1.0):
      raise ValueError("erases is of delta rules, with curvature=1 and step='channel'")

  @property
  def gates(self) -> dict[str, Gate]:
    """Retention alpha, momentum beta, step size eta, RWKV-7's write, as far as the rule has them."""
    gates = {"alpha": self.decays, "beta": "head" if self.momentum else None, "eta": self.step}
    gates["write"] = "channel" if self.erases == "erase" else None
    return {name: Gate(per_channel=kind == "channel") for name, kind in gates.items() if kind}

  @property
  def transition(self) -> str | None:
    """Without momentum a stretch of tokens is an affine map of the state before it."""
    if self.momentum:
      return None
    return "matrix" if self.curvature else {None: "scalar", "head": "scalar", "channel": "channel"}[self.decays]

  def init(self, key: jax.Array, *, heads: int, head_dim: int, value_dim: int | None = None) -> Weights:
    """M_0 = 0: {"w": [heads, head_dim, value_dim]} float32."""
    return self.network.init(key, heads, head_dim, value_dim)

  def gate_init(self, segment_length: int) -> dict[str, GateInit]:
    """Where gates start that are sigmoids, eta at half its maximum; published models have others (models/forms.py)."""
    starts = {
      "alpha": retention_init(segment_length),
      "beta": momentum_init(segment_length),
      "eta": GateInit(0.0, 1.0 if self.max_step is None else self.max_step),
      "write": GateInit(0.0),
    }
    return {name: starts[name] for name in self.gates}

  def start(self, fresh: Weights, k: jax.Array) -> State:
    """M_0 and no momentum, see `Rule.start`."""
    memory = chunks.new_memory(fresh, k)
    return State(memory, jax.tree.map(jnp.zeros_like, memory) if self.momentum else None)

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
  ) -> "tuple[State, chunks.Online | Online]":
    """One chunk step, see `Rule.write`."""
    del chunk  # a token is written the same wherever in its chunk it is
    seen = visible(documents, k.shape[-2])
    gates = {name: gate.astype(state_dtype(k.dtype)) for name, gate in gates.items()}
    if self.decays == "channel":
      return self._write_by_channel(start, fresh, k, v, gates, seen, solve)
    return self._write_by_head(start, fresh, k, v, gates, seen, solve)

  def _write_by_head(self, start, fresh, k, v, gates, seen, solve):
    """Decays are numbers a head: coefficients [T, T], as chunk.py has them."""
    dtype, alpha = k.dtype, gates.get("alpha")
    steps = (gates["eta"],) if self.step else ()
    c = chunks.coefficients(alpha, gates.get("beta"), steps, seen, dtype)
    delta = -v
    if self.curvature:
      before = chunks.faded_prior(c, seen) if self.decay_first else chunks.prior(c, alpha, seen)
      read = chunks.start_read(start, fresh, seen.incoming, dtype)
      error = chunks.before_writes(read, start, fresh, "w", seen.incoming, before, dtype)("w", k) - v
      delta = solve(self.curvature * before.mix * gram(k, k, dtype), self.curvature * error)
    online = chunks.Online(start, fresh, seen, {"w": c}, {"w": k}, {"w": delta})
    memory, momentum = chunks.write_state(online, dtype)
    return State(memory, momentum if self.momentum else None), online

  def _write_by_channel(self, start, fresh, k, v, gates, seen, solve):
    """Decays are numbers a key channel, and step sizes may be."""
    dtype, wide = k.dtype, state_dtype(k.dtype)
    decays = Channels.of(gates["alpha"], seen)
    before = decays if self.decay_first else decays.before(gates["alpha"])
    k = k.astype(wide)
    look, erased, written = self._keys(k, gates)
    if not self.curvature:
      writes = ((written, -v.astype(wide)),)
    else:
      answer = before.came_in(look, start.memory["w"], fresh["w"], dtype)
      on_erased = before.pairs(look, erased, dtype, strict=True)
      if self.erases == "erase":
        answer += product(before.pairs(look, written, dtype, strict=True), v, dtype)
        writes = ((erased, solve(on_erased, answer)), (written, -v.astype(wide)))
      else:
        writes = ((erased, solve(self.curvature * on_erased, self.curvature * (answer - v))),)
    online = Online(start, fresh, decays, writes)
    return State({"w": online.end(dtype)}), online

  def _keys(self, k, gates):
    """The keys that are looked up, erased and written; a step size is in those that are written."""
    eta = gates.get("eta", 1.0)
    if self.step == "head":
      eta = column(eta)
    if self.erases == "read":
      return eta * k, k, k
    if self.erases == "erase":
      return k, eta * k, gates["write"] * k
    return k, eta * k, eta * k

  def decay(self, gates: Weights, dtype: jnp.dtype) -> jax.Array:
    """The product of alpha, see `Rule.decay`."""
    if not self.decays:
      return jnp.ones((1, 1, 1, 1), dtype)
    alpha = gates["alpha"].astype(dtype)
    if self.decays == "head":
      return arithmetic.total(alpha)[..., None, None]
    return jnp.exp(_channel_logs(alpha).sum(-2))[..., None]

  def token_start(self, fresh: Weights) -> TokenState:
    """See `Rule.token_start`."""
    return TokenState(fresh, jax.tree.map(jnp.zeros_like, fresh))

  def token(
    self, state: TokenState, fresh: Weights, k: jax.Array, v: jax.Array, gates: Weights, chunk_begins: jax.Array
  ) -> TokenState:
    """(W_{t-1}, S_{t-1}) to (W_t, S_t), as the module's text has them."""
    del fresh, chunk_begins
    (w,), (s,) = state.memory.values(), state.momentum.values()
    fades = gates.get("alpha", 1.0)
    if self.decays == "channel":
      fades = jnp.maximum(fades, math.exp(_LEAST_LOG))[:, None]
    eta = gates.get("eta", 1.0)
    look, erased, written = k, eta * k, eta * k
    if self.erases == "read":
      look, erased, written = eta * k, k, k
    elif self.erases == "erase":
      written = gates["write"] * k
    step = jnp.outer(written, v) * (self.curvature or 1.0)
    if self.curvature:
      answer = jnp.matmul(look, fades * w if self.decay_first else w, precision=jax.lax.Precision.HIGHEST)
      step -= self.curvature * jnp.outer(erased, answer)
    s = gates.get("beta", 0.0) * s + step
    return TokenState({"w": fades * w + s}, {"w": s})


class Channels(NamedTuple):
  """The decays of a chunk's tokens for each key channel: at token t, a_t o ... o a_1 of what came in.

  Products of decays between two tokens, e^(L_t - L_j), are one factor of the query, one of the key, and both must be
  finite. So the chunk is halved again and again: where queries are in a second half and keys in the first, L at the
  boundary is between theirs, and no exponent is positive. Blocks of 8 at the diagonal have the first token's L
  instead, and exponents of at most 77.

  Attributes:
    logs: L_t [..., T, d], over the whole chunk, whatever documents are in it: of the keys.
    queries: the same of the queries, L_t, or L_{t-1} if they look before the decay.
    total: e^L_t of each document by itself, [..., T, d]: what is left of the state that it began with.
    seen: who sees whom.
  """

  logs: jax.Array
  queries: jax.Array
  total: jax.Array
  seen: Visible

  @staticmethod
  def of(alpha: jax.Array, seen: Visible) -> "Channels":
    """Of alpha [..., T, d], at least float32."""
    step, length = _channel_logs(alpha), alpha.shape[-2]
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    logs = arithmetic.masked_vector_sums(rows >= columns, step)
    total = logs if seen.incoming is None else arithmetic.masked_vector_sums(seen.same, step)
    return Channels(logs, logs, jnp.exp(total), seen)

  def before(self, alpha: jax.Array) -> "Channels":
    """The decays that queries find who look before their own token's."""
    step = _channel_logs(alpha)
    return self._replace(queries=self.logs - step, total=self.total * jnp.exp(-step))

  def came_in(self, x: jax.Array, w: jax.Array, fresh: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x_t (A_t o W_0): x [..., T, in] to [..., T, out]; W_0 is M_0 for documents that began in the chunk."""
    x = x * self.total
    y, incoming = product(x, w, dtype), self.seen.incoming
    return y if incoming is None else jnp.where(incoming, y, product(x, fresh, dtype))

  def pairs(self, x: jax.Array, z: jax.Array, dtype: jnp.dtype, *, strict: bool = False) -> jax.Array:
    """<x_t o e^(L_t - L_j), z_j> where t sees j, with `strict` j < t; 0 elsewhere. x, z [..., T, d] to [..., T, T]."""
    dtype = jnp.float32 if dtype == jnp.float16 else dtype  # whose largest number is e^11
    length = x.shape[-2]
    row, col = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    token = jax.lax.broadcasted_iota(jnp.int32, (length, 1), 0)
    first = self._reference(_BLOCK, 0)
    found = gram(x * jnp.exp(self.queries - first), z * jnp.exp(first - self.logs), dtype)
    for level in range(_BLOCK.bit_length() - 1, (length - 1).bit_length()):  # halves of 2^level tokens
      second = (token >> level) & 1 == 1
      boundary = self._reference(2 << level, (1 << level) - 1)
      queries = jnp.exp(jnp.where(second, self.queries - boundary, -jnp.inf))
      keys = jnp.exp(jnp.where(second, -jnp.inf, boundary - self.logs))
      found = jnp.where(row >> level == (col >> level) + 1, gram(x * queries, z * keys, dtype), found)
    return jnp.where(earlier(self.seen) if strict else self.seen.same, found, 0.0)

  def _reference(self, block: int, place: int) -> jax.Array:
    """L at a place of each token's block, [..., T, d]; in a block that ends before that, at its end.

    It cancels, and so would its gradients, all but their roundings.
    """
    logs, length, rows = jax.lax.stop_gradient(self.logs), self.logs.shape[-2], []
    for begin in range(0, length, block):
      here = min(begin + place, length - 1)
      count = min(block, length - begin)
      rows.append(jnp.broadcast_to(logs[..., here : here + 1, :], (*logs.shape[:-2], count, logs.shape[-1])))
    return jnp.concatenate(rows, -2) if len(rows) > 1 else rows[0]


class Online(NamedTuple):
  """The online memory of every token of a chunk: x_t W_t = A_t o x_t W_0 - sum over writes (z, delta) of pairs delta.

  Attributes:
    start: the state before the chunk.
    fresh: M_0 {"w": [heads, in, out]}.
    decays: of the chunk's tokens.
    writes: (z [..., T, in], delta [..., T, out]), one pair of arrays or two.
  """

  start: State
  fresh: Weights
  decays: Channels
  writes: tuple[tuple[jax.Array, jax.Array], ...]

  def read(self, name: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x_t W_t, see `rule.Online`."""
    y = self.decays.came_in(x.astype(self.decays.total.dtype), self.start.memory[name], self.fresh[name], dtype)
    for z, delta in self.writes:
      y -= product(self.decays.pairs(x, z, dtype), delta, dtype)
    return y

  def end(self, dtype: jnp.dtype) -> jax.Array:
    """W_T [..., in, out]."""
    decays, w = self.decays, self.start.memory["w"]
    if decays.seen.continues is not None:
      w = jnp.where(decays.seen.continues, w, self.fresh["w"])
    w = column(decays.total[..., -1, :]) * w
    left = jnp.exp(decays.logs[..., -1:, :] - decays.logs)
    for z, delta in self.writes:
      z = z * left
      if decays.seen.continues is not None:  # the last token's document
        z = jnp.where(jnp.swapaxes(decays.seen.last, -1, -2), z, 0.0)
      # Rounded, a key that has faded is no longer quite along itself, and what is written beside it nobody corrects.
      w -= arithmetic.fine_product(jnp.swapaxes(z, -1, -2), delta.astype(z.dtype), dtype)
    return w


def _channel_logs(alpha: jax.Array) -> jax.Array:
  """log alpha of each channel, at least that of e^-11 a token."""
  return jnp.maximum(arithmetic.log(alpha), _LEAST_LOG)


def retnet(*, chunk: int = 64, learned_init: bool = False) -> MatrixRule:
  """Retention, W_t = alpha W_{t-1} + k_t (x) v_t (arXiv:2307.08621); its models have alpha = 1 - 2^(-5-h) in head h."""
  return MatrixRule("retnet", chunk, "head", step=None, learned_init=learned_init)


def mamba2(*, chunk: int = 64, max_step: float | None = None, learned_init: bool = False) -> MatrixRule:
  """Mamba-2, W_t = alpha_t W_{t-1} + eta_t k_t (x) v_t (arXiv:2405.21060): k is B, q is C, eta the step dt."""
  return MatrixRule("mamba2", chunk, "head", max_step=max_step, learned_init=learned_init)


def gla(*, chunk: int = 64, learned_init: bool = False) -> MatrixRule:
  """Gated linear attention, W_t = alpha_t o W_{t-1} + k_t (x) v_t, alpha by channel (arXiv:2312.06635)."""
  return MatrixRule("gla", chunk, "channel", step=None, learned_init=learned_init)


def deltanet(*, chunk: int = 64, max_step: float | None = None, learned_init: bool = False) -> MatrixRule:
  """DeltaNet, W_t = W_{t-1} - eta_t k_t (x) (k_t W_{t-1} - v_t) (arXiv:2406.06484)."""
  return MatrixRule("deltanet", chunk, curvature=1.0, max_step=max_step, learned_init=learned_init)


def gated_deltanet(*, chunk: int = 64, max_step: float | None = None, learned_init: bool = False) -> MatrixRule:
  """Gated DeltaNet: DeltaNet after a decay by head, whose error sees it (arXiv:2412.06464)."""
  return MatrixRule("gated_deltanet", chunk, "head", curvature=1.0, max_step=max_step, learned_init=learned_init)


def kda(*, chunk: int = 64, max_step: float | None = None, learned_init: bool = False) -> MatrixRule:
  """Kimi Delta Attention: DeltaNet after a decay by channel, whose error sees it (arXiv:2510.26692)."""
  return MatrixRule("kda", chunk, "channel", curvature=1.0, max_step=max_step, learned_init=learned_init)


def gdn2(*, chunk: int = 64, max_step: float | None = None, learned_init: bool = False) -> MatrixRule:
  """Gated DeltaNet 2, W_t = alpha_t o W_{t-1} - k_t (x) ((eta_t o k_t) (alpha_t o W_{t-1}) - v_t) (arXiv:2605.22791).

  Its write gate, one for each channel of the value, is part of v.
  """
  return MatrixRule(
    "gdn2",
    chunk,
    "channel",
    curvature=1.0,
    step="channel",
    erases="read",
    max_step=max_step,
    learned_init=learned_init,
  )


def rwkv7(*, chunk: int = 64, max_step: float | None = None, learned_init: bool = False) -> MatrixRule:
  """RWKV-7, W_t = alpha_t o W_{t-1} - eta_t o k_t (x) (k_t W_{t-1}) + write_t o k_t (x) v_t (arXiv:2503.14456)."""
  return MatrixRule(
    "rwkv7",
    chunk,
    "channel",
    decay_first=False,
    curvature=1.0,
    step="channel",
    erases="erase",
    max_step=max_step,
    learned_init=learned_init,
  )


def momentum_deltanet(*, chunk: int = 64, max_step: float | None = None, learned_init: bool = False) -> MatrixRule:
  """Titans with a matrix memory, its gradients not frozen (arXiv:2501.00663, Eq. 8-14; arXiv:2602.24281, Eq. 34-36).

  S_t = beta_t S_{t-1} - eta_t 2 k_t (x) (k_t W_{t-1} - v_t), W_t = alpha_t W_{t-1} + S_t.
  """
  return MatrixRule(
    "momentum_deltanet",
    chunk,
    "head",
    decay_first=False,
    curvature=2.0,
    momentum=True,
    max_step=max_step,
    learned_init=learned_init,
  )
