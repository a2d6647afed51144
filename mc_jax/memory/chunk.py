"""The online memory inside one chunk: everything a matrix product (arXiv:2602.24281, section 4.3; arXiv:2407.04620).

Of a layer whose token j writes an outer product of an input z_j and an error delta_j, unrolling

  S_t = beta_t S_{t-1} - sum_i eta^(i)_t z_{t-i} (x) delta_{t-i},   W_t = alpha_t W_{t-1} + S_t

over a chunk gives

  W_t = A_t W_0 + c_t S_0 - sum_j C_tj z_j (x) delta_j,          S_T = b_T S_0 - sum_j (Q B)_Tj z_j (x) delta_j,

  A_t = prod_{r<=t} alpha_r,  P_ti = prod_{i<r<=t} alpha_r,  b_t = prod_{r<=t} beta_r,  Q_ij = prod_{j<r<=i} beta_r,
  B_ij = eta^(i-j)_i (banded: a window),  C = P Q B,  c_t = sum_{i<=t} P_ti b_i,

hence an online read is two dense products and one causal linear attention:

  x_t W_t = A_t (x_t W_0) + c_t (x_t S_0) - sum_j C_tj <x_t, z_j> delta_j.

Where the z_j and delta_j come from is a rule's business (rules/).

Shapes: `...` is [batch, heads], T the chunk's tokens, J = T + window - 1 the keys written in it (a window reaches
back; the chunk's keys come first), d = head_dim. Documents broadcast over heads: [batch, 1, T].
Values and answers are [..., value_dim].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.memory import arithmetic
from mc_jax.memory.arithmetic import column, product, state_dtype, weighed
from mc_jax.memory.documents import Visible, earlier, positions
from mc_jax.memory.networks import Linear, Weights


class State(NamedTuple):
  """What a memory carries from token to token. Only `memory` is ever cached; all else is zero in a new memory.

  A rule that carries something else has a NamedTuple of its own, with `memory` in it.

  Attributes:
    memory: M, {name: [..., in, out]}, at least float32.
    momentum: S, {name: [..., in, out]} of layers that have one; None if the rule has none.
    tail: keys and values of the last window - 1 tokens, [..., window - 1, d] and [..., window - 1, value_dim]; None if
      the window is 1. Zero where there is no such token: a zero pair writes nothing.
  """

  memory: Weights
  momentum: Weights | None = None
  tail: tuple[jax.Array, jax.Array] | None = None


class Coefficients(NamedTuple):
  """How the chunk's decays and step sizes weigh what is written (the module's text).

  Attributes:
    decay: A [..., T], or None without retention (1).
    regained: 1 - A [..., T], the share of M_0; None where memories fade to zero, or do not.
    carry: c [..., T], or None without momentum. Used only by tokens that continue the document of S_0.
    mix: C [..., T, J].
    kept: b [..., T], or None without momentum.
    momentum: (Q B)_T [..., J], or None without momentum.
  """

  decay: jax.Array | None
  regained: jax.Array | None
  carry: jax.Array | None
  mix: jax.Array
  kept: jax.Array | None
  momentum: jax.Array | None


class Prior(NamedTuple):
  """The coefficients of W_{t-1}, for rules that solve (rules/gradient.py): A', c' [..., T, 1] and C'."""

  decay: jax.Array | None
  regained: jax.Array | None
  carry: jax.Array | None
  mix: jax.Array


class Online(NamedTuple):
  """The online memory of every token of a chunk, ready to be read.

  Attributes:
    start: the state before the chunk; its memory is W_0, its momentum S_0.
    fresh: M_0 {name: [heads, in, out]}, where documents that start in the chunk begin.
    seen: who sees whom; which tokens continue the document of `start`.
    coefficients: A, c and C of each layer.
    inputs: z {name: [..., J, in]}; errors: delta {name: [..., J, out]}.
    rest: anything else that the rule needs to continue in the middle of the chunk.
  """

  start: State
  fresh: Weights
  seen: Visible
  coefficients: dict[str, Coefficients]
  inputs: Weights
  errors: Weights
  rest: Any = None

  def read(self, name: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x_t W_t: every token through its own online weights. x [..., T, in] to [..., T, out], at least float32."""
    c, incoming = self.coefficients[name], self.seen.incoming
    y = start_read(self.start, self.fresh, incoming, dtype, c)(name, x)
    if c.carry is not None:
      carried = weighed(c.carry[..., None], x, self.start.momentum[name], dtype)
      y += carried if incoming is None else jnp.where(incoming, carried, 0.0)
    attention = c.mix * arithmetic.gram(x, self.inputs[name], dtype)
    return y - product(attention, self.errors[name], dtype)


def new_memory(fresh: Weights, k: jax.Array) -> Weights:
  """M_0 {name: [heads, in, out]} of each sequence of k [batch, heads, T, d]: {name: [batch, heads, in, out]}."""
  return {name: jnp.broadcast_to(w, (len(k), *w.shape)).astype(state_dtype(k.dtype)) for name, w in fresh.items()}


def coefficients(
  alpha: jax.Array | None,
  beta: jax.Array | None,
  steps: tuple[jax.Array, ...],
  seen: Visible,
  compute: jnp.dtype,
  *,
  regains: bool = False,
) -> Coefficients:
  """A, c, C and the last rows that the next state needs, of gates [..., T] that are at least float32.

  Args:
    alpha, beta: retention and momentum; None for none.
    steps: eta of the current token and of those before it, as many as the window has; () for steps of 1.
    seen: who sees whom.
    compute: products' dtype.
    regains: what fades makes way for M_0.
  """
  dtype = state_dtype(compute)

  def stepped(weights):  # weights @ B
    if not steps:
      return weights
    if len(steps) == 1:
      return weights * steps[0][..., None, :]
    length, keys = seen.reach.shape[-2:]
    age = jax.lax.broadcasted_iota(jnp.int32, (length, keys), 0) - positions(length, keys)
    band = sum(jnp.where(age == i, column(eta), 0.0) for i, eta in enumerate(steps))
    return product(weights, jnp.where(seen.reach, band, 0.0), compute)

  retained = arithmetic.decays(alpha, seen.same, dtype)
  regained = 1.0 - retained.total if regains else None
  if beta is None:
    return Coefficients(retained.total, regained, None, stepped(retained.since), None, None)
  kept = arithmetic.decays(beta, seen.same, dtype)
  accumulated = stepped(kept.since)
  carry = (retained.since * kept.total[..., None, :]).sum(-1)  # sum_i P_ti b_i
  mix = product(retained.since, accumulated, compute)  # P Q B
  return Coefficients(retained.total, regained, carry, mix, kept.total, accumulated[..., -1, :])


def at_once(eta: jax.Array, seen: Visible) -> Coefficients:
  """The coefficients of layers that take each step at once and keep it: A = 1, c = 0, C_tj = eta_j."""
  return Coefficients(None, None, None, jnp.where(seen.same, eta[..., None, :], 0.0), None, None)


def prior(c: Coefficients, alpha: jax.Array | None, seen: Visible) -> Prior:
  """The coefficients of the token before, 0 where there is none in the document and the chunk."""
  decay = regained = carry = None
  if alpha is not None:  # of the tokens before; not A / alpha, which is nothing to rely on where alpha is small
    decay = arithmetic.totals(alpha, earlier(seen))
  if c.regained is not None:
    regained = 1.0 - decay
  if c.carry is not None:
    carry = arithmetic.shifted(column(c.carry))
  mix = arithmetic.shifted(c.mix)
  if seen.incoming is not None:  # the token before may be another document's
    mix = jnp.where(seen.same, mix, 0.0)
  return Prior(decay, regained, carry, mix)


def faded_prior(c: Coefficients, seen: Visible) -> Prior:
  """The coefficients of the token's own state before its write, after its decay; without momentum."""
  return Prior(c.decay, c.regained, None, jnp.where(earlier(seen), c.mix, 0.0))


def start_read(
  start: State, fresh: Weights, incoming: jax.Array | None, dtype: jnp.dtype, c: Coefficients | Prior | None = None
) -> Linear:
  """Reads A_t W_0, and with it what M_0 regains, where W_0 is M_0 of documents that start in the chunk; None: A = 1."""
  decay, regained = (None, None) if c is None else (_column_of(c.decay), _column_of(c.regained))

  def read(name, x):
    before = weighed(decay, x, start.memory[name], dtype)
    if regained is None:
      return before if incoming is None else jnp.where(incoming, before, weighed(decay, x, fresh[name], dtype))
    if incoming is None:
      return before + weighed(regained, x, fresh[name], dtype)
    return jnp.where(incoming, before, 0.0) + weighed(jnp.where(incoming, regained, 1.0), x, fresh[name], dtype)

  return read


def before_writes(
  linear: Linear,
  start: State,
  fresh: Weights,
  last: str,
  incoming: jax.Array | None,
  prior: Prior,
  dtype: jnp.dtype,
) -> Linear:
  """Reads A'_t W_0 + c'_t S_0, and what M_0 regained, in the last layer, and by `linear` W_0 in the others."""
  faded = start_read(start, fresh, incoming, dtype, prior)

  def read(name, x):
    if name != last:
      return linear(name, x)
    y = faded(name, x)
    if prior.carry is not None:
      carried = weighed(prior.carry, x, start.momentum[name], dtype)
      y += carried if incoming is None else jnp.where(incoming, carried, 0.0)
    return y

  return read


def write_state(online: Online, dtype: jnp.dtype) -> tuple[Weights, Weights]:
  """Memory and momentum after the chunk, {name: [..., in, out]} of each; momentum of layers that have one."""
  start, fresh, seen = online.start, online.fresh, online.seen

  def came_in(before, otherwise):  # the state before the chunk, if it is the last token's
    return before if seen.continues is None else jnp.where(seen.continues, before, otherwise)

  def written(name, weights):  # sum_j weights_j z_j (x) delta_j, weighing the narrower of the two
    z, delta = online.inputs[name], online.errors[name]
    if z.shape[-1] < delta.shape[-1]:
      z = column(weights) * z
    else:
      delta = column(weights) * delta
    return product(jnp.swapaxes(z, -1, -2), delta, dtype)

  memory, momentum = {}, {}
  for name, c in reversed(online.coefficients.items()):  # the last layer's errors are there first: fewer bundles
    memory[name] = came_in(start.memory[name], fresh[name])
    if c.decay is not None:
      memory[name] = c.decay[..., -1, None, None] * memory[name]
    if c.regained is not None:
      memory[name] += c.regained[..., -1, None, None] * fresh[name]
    if c.carry is not None:
      before = came_in(start.momentum[name], 0.0)
      memory[name] += c.carry[..., -1, None, None] * before
      momentum[name] = c.kept[..., -1, None, None] * before - written(name, c.momentum)
    memory[name] -= written(name, c.mix[..., -1, :])
  return {name: memory[name] for name in online.coefficients}, momentum  # in the order of the layers


def last_keys(x: jax.Array, count: int, seen: Visible) -> jax.Array:
  """The last document's last `count` keys, zero where it has fewer: [..., J, d] to [..., count, d].

  Padding at the end leaves the window as it was: it ends at the last key of the document.
  """
  keys = x.shape[-2]
  position = positions(keys - count, keys)
  end = jnp.where(seen.last, position, -keys).max(-1, keepdims=True)
  before_end = count - 1 - jax.lax.broadcasted_iota(jnp.int32, (count, keys), 0)
  pick = (end - before_end == position) & seen.last
  return product(pick, x, x.dtype).astype(x.dtype)


def _column_of(x: jax.Array | None) -> jax.Array | None:
  return None if x is None else column(x)
