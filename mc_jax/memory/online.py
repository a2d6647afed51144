"""The online memory inside one chunk: everything a matrix product (arXiv:2602.24281, section 4.3; arXiv:2407.04620).

Inner gradients are taken at the state before the chunk, so a layer's gradient at token j is an outer product of its
input z_j and its output's error delta_j, and unrolling the rule's recurrence (rules.py) over the chunk gives

  W_t = A_t W_0 + c_t S_0 - sum_j C_tj z_j (x) delta_j,          S_T = b_T S_0 - sum_j (Q B)_Tj z_j (x) delta_j,

  A_t = prod_{r<=t} alpha_r,  P_ti = prod_{i<r<=t} alpha_r,  b_t = prod_{r<=t} beta_r,  Q_ij = prod_{j<r<=i} beta_r,
  B_ij = eta^(i-j)_i (banded: a window),  C = P Q B,  c_t = sum_{i<=t} P_ti b_i,

hence an online read is two dense products and one causal linear attention:

  x_t W_t = A_t (x_t W_0) + c_t (x_t S_0) - sum_j C_tj <x_t, z_j> delta_j.

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
`rule.frozen_share` of what the last layer does. Nor may steps grow as features die, see `Keys.scale`. Without either, a
memory that is carried on through tokens that cannot be learned grows without bound, and amplifies roundings.

Shapes: `...` is [batch, heads], T the chunk's tokens, J = T + window - 1 the keys written in it (a window reaches
back; the chunk's keys come first), d = head_dim. Documents broadcast over heads: [batch, 1, T].
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.memory import networks, triangular
from mc_jax.memory.documents import Documents, Visible, positions, visible
from mc_jax.memory.networks import Linear, Weights
from mc_jax.memory.rules import Rule

# Added to what steps are divided by: keys of padding are zero.
_TINY = 1e-6
_LEAST_GAIN = 1e-12  # below it a square root's derivative is of no use
_NOTHING = 1e-18  # added to what may be 0 / 0: the derivative has its inverse squared, which is finite in float32


class State(NamedTuple):
  """What a memory carries from token to token. Only `memory` is ever cached.

  Attributes:
    memory: M, {name: [..., in, out]}, at least float32.
    momentum: S, like memory, of a normalized rule its last layer's alone; None if the rule has none.
    tail: keys and values of the last window - 1 tokens, [..., window - 1, d] each; None if the window is 1. Zero where
      there is no such token: a zero pair writes nothing.
  """

  memory: Weights
  momentum: Weights | None
  tail: tuple[jax.Array, jax.Array] | None


class Coefficients(NamedTuple):
  """How the chunk's decays and step sizes weigh what is written (the module's text).

  Attributes:
    decay: A [..., T], or None without retention (1).
    regained: 1 - A [..., T], the share of M_0; None where memories fade to zero, or do not.
    carry: c [..., T], or None without momentum. It counts where the document of S_0 goes on.
    mix: C [..., T, J].
    kept: b_T [...], or None without momentum.
    momentum: (Q B)_T [..., J], or None without momentum.
  """

  decay: jax.Array | None
  regained: jax.Array | None
  carry: jax.Array | None
  mix: jax.Array
  kept: jax.Array | None
  momentum: jax.Array | None


class Solving(NamedTuple):
  """The tokens of a chunk so far, by which a rule that solves corrects the next token's error.

  Attributes:
    momentum: beta_{t-1} .. beta_1 S_0 of the last layer, [..., in, out]; None without momentum.
    features: of the tokens, see `Keys`, [..., T, in].
    answers: delta of the network's answers, in steps, [..., T, d].
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


class Prior(NamedTuple):
  """The coefficients of W_{t-1}: A', c' [..., T, 1] and C' of the module's text, as Coefficients has A, c and C."""

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
    inputs: z, times f, {name: [..., J, in]}; errors: delta {name: [..., J, out]}.
    features: see `Keys`; answers: delta of the network's answers [..., J, d], in steps as `errors` are.
  """

  start: State
  fresh: Weights
  seen: Visible
  coefficients: dict[str, Coefficients]
  inputs: Weights
  errors: Weights
  features: jax.Array | None
  answers: jax.Array


def state_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """States, decays, scores and softmax are at least float32, whatever the inputs are."""
  return jnp.promote_types(dtype, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """a @ b with operands rounded to the compute dtype and an accumulator of at least float32, in its gradient too.

  bfloat16 operands are one pass of a TPU's matrix unit. float32 ones are multiplied as float32 (six passes): left to
  their defaults, XLA and Mosaic would round them to bfloat16 without a word.
  """
  precision = jax.lax.Precision.DEFAULT if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
  a, b = a.astype(dtype), b.astype(dtype)
  if a.ndim < b.ndim:  # XLA:CPU fails on one transposed bfloat16 matrix for many: "BF16 x BF16 = F32" unimplemented
    a = jnp.broadcast_to(a, (*b.shape[:-2], *a.shape[-2:]))
  return jnp.matmul(a, b, precision=precision, preferred_element_type=state_dtype(dtype))


def _product_forward(a, b, dtype):
  # Only the gradients that are asked for are made. An empty array remembers what shape and dtype one must have.
  def other(x, y):
    return (y.value.astype(dtype), jnp.empty((*x.value.shape, 0), x.value.dtype)) if x.perturbed else None

  return product(a.value, b.value, dtype), (other(a, b), other(b, a))


def _product_backward(dtype, residuals, cotangent):
  def gradient(x, y, like):
    return _sum_to(product(x, y, dtype), like.shape[:-1]).astype(like.dtype)

  for_a, for_b = residuals
  return (
    for_a and gradient(cotangent, jnp.swapaxes(for_a[0], -1, -2), for_a[1]),
    for_b and gradient(jnp.swapaxes(for_b[0], -1, -2), cotangent, for_b[1]),
  )


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Sums over the axes along which an array of `shape` was broadcast to x's."""
  x = x.sum(tuple(range(x.ndim - len(shape))))
  return x.sum([i for i, (n, to) in enumerate(zip(x.shape, shape, strict=True)) if n != to], keepdims=True)


def dense(weights: Weights, dtype: jnp.dtype) -> Linear:
  """Reads a plain state: linear(name, x) = x @ W."""
  return lambda name, x: product(x, weights[name], dtype)


def start_state(rule: Rule, fresh: Weights, k: jax.Array) -> State:
  """M_0, no momentum, an empty window, for each sequence of k [batch, heads, T, d]. fresh: {name: [heads, in, out]}."""
  memory = {name: jnp.broadcast_to(w, (len(k), *w.shape)).astype(state_dtype(k.dtype)) for name, w in fresh.items()}
  momentum = None
  if rule.momentum:
    names = [networks.last(rule.network, fresh)] if rule.normalized else memory
    momentum = {name: jnp.zeros_like(memory[name]) for name in names}
  empty = jnp.zeros((*k.shape[:-2], rule.window - 1, k.shape[-1]), k.dtype)
  return State(memory, momentum, (empty, empty) if rule.window > 1 else None)


def write(
  rule: Rule,
  start: State,
  fresh: Weights,
  k: jax.Array,
  v: jax.Array,
  gates: Weights,
  documents: Documents | None,
  *,
  chunk: Chunk | None = None,
  solve: Callable[[jax.Array, jax.Array], jax.Array] = triangular.solve,
) -> tuple[State, Online]:
  """One chunk step: writes T tokens; returns the state after them and the online memory of each.

  Args:
    rule: what is written how.
    start: the state before the chunk.
    fresh: M_0, {name: [heads, in, out]}, where a document that starts in the chunk begins.
    k, v: [..., T, d], zero at padding.
    gates: {name: [..., T]}, finite and positive at padding.
    documents: arrays [batch, 1, T]; None for one document without padding.
    chunk: of one token in the middle of a chunk, what came before it there; T is 1 then.
    solve: triangular systems.
  """
  dtype = k.dtype
  seen = visible(documents, k.shape[-2], rule.window)
  if rule.window > 1:
    k, v = (jnp.concatenate([x, tail], -2) for tail, x in zip(start.tail, (k, v), strict=True))
  own, prior = coefficients(rule, gates, seen, dtype)
  c = dict.fromkeys(fresh, own)
  if rule.normalized:
    c = dict.fromkeys(fresh, _at_once(gates, seen, dtype)) | {networks.last(rule.network, fresh): own}
  at = _start_read(start, fresh, seen.keys_incoming, dtype)
  if chunk is not None:
    at = dense(chunk.memory, dtype)
  elif rule.solve:
    at = _before_writes(at, start, fresh, networks.last(rule.network, fresh), seen.keys_incoming, prior, dtype)
  keys = key_gradients(rule, k, v, at, fresh)
  if rule.solve and chunk is None:
    moved = rule.curvature * prior.mix * _gram(keys.features, keys.features, dtype)
    keys = keys._replace(answers=solve(keys.scale * moved, keys.answers))
  elif rule.solve:
    earlier = chunk.solving
    moved = rule.curvature * earlier.mix[..., None, :] * _gram(keys.features, earlier.features, dtype)
    keys = keys._replace(answers=keys.answers - keys.scale * product(moved, earlier.answers, moved.dtype))
  inputs, errors = keys.pull(keys.answers)

  def came_in(before, otherwise):  # the state before the chunk, if it is the last token's
    return before if seen.continues is None else jnp.where(seen.continues, before, otherwise)

  def written(name, weights):  # sum_j weights_j z_j (x) delta_j, weighing the narrower of the two
    z, delta = inputs[name], errors[name]
    if z.shape[-1] < delta.shape[-1]:
      z = _column(weights) * z
    else:
      delta = _column(weights) * delta
    return product(jnp.swapaxes(z, -1, -2), delta, dtype)

  memory, momentum = {}, {}
  for name, own in reversed(c.items()):  # the last layer's errors are there first: fewer bundles
    memory[name] = came_in(start.memory[name], fresh[name])
    if own.decay is not None:
      memory[name] = own.decay[..., -1, None, None] * memory[name]
    if own.regained is not None:
      memory[name] += own.regained[..., -1, None, None] * fresh[name]
    if own.carry is not None:
      before = came_in(start.momentum[name], 0.0)
      memory[name] += own.carry[..., -1, None, None] * before
      momentum[name] = own.kept[..., None, None] * before - written(name, own.momentum)
    memory[name] -= written(name, own.mix[..., -1, :])
  memory = {name: memory[name] for name in c}  # in the order of the layers
  tail = tuple(_last(x, rule.window - 1, seen) for x in (k, v)) if rule.window > 1 else None
  end = State(memory, momentum if rule.momentum else None, tail)
  return end, Online(start, fresh, seen, c, inputs, errors, keys.features, keys.answers)


def read(online: Online, name: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """x_t W_t: every token through its own online weights. x [..., T, in] to [..., T, out], at least float32."""
  c, incoming = online.coefficients[name], online.seen.incoming
  y = _start_read(online.start, online.fresh, incoming, dtype, c)(name, x)
  if c.carry is not None:
    carried = _weighed(c.carry[..., None], x, online.start.momentum[name], dtype)
    y += carried if incoming is None else jnp.where(incoming, carried, 0.0)
  attention = c.mix * product(x, jnp.swapaxes(online.inputs[name], -1, -2), dtype)
  return y - product(attention, online.errors[name], dtype)


def coefficients(rule: Rule, gates: Weights, seen: Visible, compute: jnp.dtype) -> tuple[Coefficients, Prior | None]:
  """A, c, C and the last rows that the next state needs; of a rule that solves, those of the tokens before as well.

  gates {name: [..., T]}; products in the compute dtype.
  """
  dtype = state_dtype(compute)
  gates = {name: gates[name].astype(dtype) for name in rule.gates}
  if rule.normalized and rule.momentum:  # an average of steps, whatever its horizon
    gates["eta"] *= 1.0 - gates["beta"]

  def stepped(weights):  # weights @ B
    if not rule.step:
      return weights
    if rule.window == 1:
      return weights * gates["eta"][..., None, :]
    length, keys = seen.reach.shape[-2:]
    age = jax.lax.broadcasted_iota(jnp.int32, (length, keys), 0) - positions(length, keys)
    band = sum(jnp.where(age == i, _column(gates[eta]), 0.0) for i, eta in enumerate(rule.steps))
    return product(weights, jnp.where(seen.reach, band, 0.0), compute)

  retained = _decays(gates.get("alpha"), seen.same, dtype)
  faded = rule.normalized and rule.retention and rule.learned_init
  regained = 1.0 - retained.total if faded else None
  kept = accumulated = None
  if rule.momentum:
    kept = _decays(gates["beta"], seen.same, dtype)
    accumulated = stepped(kept.since)
    carry = (retained.since * kept.total[..., None, :]).sum(-1)  # sum_i P_ti b_i
    mix = product(retained.since, accumulated, compute)  # P Q B
    c = Coefficients(retained.total, regained, carry, mix, kept.total[..., -1], accumulated[..., -1, :])
  else:
    c = Coefficients(retained.total, regained, None, stepped(retained.since), None, None)
  return c, _prior(c, gates.get("alpha"), None if kept is None else kept.total, seen) if rule.solve else None


def _prior(c: Coefficients, alpha: jax.Array | None, kept: jax.Array | None, seen: Visible) -> Prior:
  """The coefficients of the token before, 0 where there is none in the document and the chunk."""
  decay = regained = carry = None
  if alpha is not None:
    decay = c.decay / jnp.maximum(alpha, jnp.finfo(alpha.dtype).tiny)
  if c.regained is not None:
    regained = 1.0 - decay
  if c.carry is not None:
    carry = c.carry[..., None] - _column(kept)  # c_t = alpha_t c_{t-1} + b_t
    if alpha is not None:
      carry /= _column(jnp.maximum(alpha, jnp.finfo(alpha.dtype).tiny))
  mix = _shifted(c.mix)
  if seen.incoming is not None:  # the token before may be another document's
    mix = jnp.where(seen.same, mix, 0.0)
  return Prior(decay, regained, carry, mix)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _shifted(x: jax.Array, back: bool = False) -> jax.Array:
  """The rows of x [..., T, J] one place further on, or back, with zeros in the place that is left.

  (The transpose of a slice pads by less than nothing, which TPU kernels cannot.)
  """
  nothing = jnp.zeros_like(x[..., :1, :])
  return jnp.concatenate([x[..., 1:, :], nothing] if back else [nothing, x[..., :-1, :]], -2)


_shifted.defvjp(lambda x, back: (_shifted(x, back), None), lambda back, _, g: (_shifted(g, not back),))


def _at_once(gates: Weights, seen: Visible, compute: jnp.dtype) -> Coefficients:
  """The coefficients of layers that take each step at once and keep it: A = 1, c = 0, C_tj = eta_j."""
  eta = gates["eta"].astype(state_dtype(compute))
  return Coefficients(None, None, None, jnp.where(seen.same, eta[..., None, :], 0.0), None, None)


class Keys(NamedTuple):
  """The inner gradients of keys.

  Attributes:
    features: the last layer's input z, times the gain of the answer in its output, [..., J, in]; None if not
      normalized. The gain is the length of the gradient of <p, M(k)>, p = (1, -1, 1, ...) / |p|: 1 unless a norm
      follows the layer.
    answers: the loss's gradient in the network's answer M(k), times `scale`, [..., J, d].
    scale: [..., J, 1], what makes a step of 1 remove all of a key's error, as far as the last layer goes; less where
      a norm makes the answer's gain smaller than 1, or steps would grow with the weights, and where features are
      smaller than the network's `least_features`. None where steps are multiples of the gradient.
    pull: (answers) to each layer's input z, {name: [..., J, in]}, times f, and its error delta, {name: [..., J, out]}.
  """

  features: jax.Array | None
  answers: jax.Array
  scale: jax.Array | None
  pull: Callable[[jax.Array], tuple[Weights, Weights]]


def key_gradients(rule: Rule, k: jax.Array, v: jax.Array, linear: Linear, weights: Weights) -> Keys:
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
    own = jnp.maximum(_square(features), rule.network.least_features * features.shape[-1])
    if not _unchanged(lambda answers: back(answers)[0][last], y):
      signs = 1 - 2 * (jax.lax.broadcasted_iota(jnp.int32, y.shape, y.ndim - 1) % 2)
      gain = _square(back(signs.astype(y.dtype) * y.shape[-1] ** -0.5)[0][last])
      features *= jnp.sqrt(jnp.maximum(gain, _LEAST_GAIN))
      own *= jnp.maximum(gain, 1.0)
    scale = 1.0 / (max(rule.curvature, 1.0) * own + _TINY)
    answers = scale * answers

  def pull(answers):
    (errors,) = back(answers.astype(y.dtype))
    if rule.max_grad_norm is None and not (rule.normalized and len(errors) > 1):
      return inputs, errors
    # Squared Frobenius norms of z (x) delta: also what a step along it removes of the key's own error.
    squares = {name: _square(inputs[name].astype(wide)) * _square(error) for name, error in errors.items()}
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


def _square(x: jax.Array) -> jax.Array:
  """Squared lengths: [..., n] to [..., 1]."""
  return jnp.square(x).sum(-1, keepdims=True)


def _gram(x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """<x_t, y_j>: [..., T, in], [..., J, in] to [..., T, J]."""
  return product(x, jnp.swapaxes(y, -1, -2), dtype)


def chunk_of(rule: Rule, online: Online) -> Chunk:
  """What a chunk's next token depends on, where `write` wrote all of the tokens before it; they are one document."""
  start, last = online.start, networks.last(rule.network, online.fresh)
  c, before = online.coefficients[last], start.memory[last]
  if rule.retention:
    before = c.decay[..., -1, None, None] * before
  if c.regained is not None:
    before += c.regained[..., -1, None, None] * online.fresh[last]
  momentum = None
  if rule.momentum:
    before += c.carry[..., -1, None, None] * start.momentum[last]
    momentum = c.kept[..., None, None] * start.momentum[last]
  solving = Solving(momentum, online.features, online.answers, c.mix[..., -1, :], c.momentum)
  return Chunk(start.memory | {last: before}, solving)


def advance(rule: Rule, chunk: Chunk, place: jax.Array, online: Online, gates: Weights) -> Chunk:
  """The chunk after one more token, its `place`-th [batch] int32, which `write` wrote with this chunk.

  gates {name: [..., 1]}.
  """
  before, last = chunk.solving, networks.last(rule.network, online.fresh)
  gates = {name: gate.astype(before.mix.dtype) for name, gate in gates.items()}
  here = (jnp.arange(before.mix.shape[-1]) == place[:, None])[:, None]
  own = online.coefficients[last].mix[..., 0, :]  # of the token's own write
  memory, momentum, mix, accumulated = chunk.memory[last], before.momentum, before.mix, before.accumulated
  if rule.retention:
    memory, mix = gates["alpha"][..., None] * memory, gates["alpha"] * mix
  if online.coefficients[last].regained is not None:
    memory += (1.0 - gates["alpha"][..., None]) * online.fresh[last]
  if rule.momentum:
    momentum, accumulated = gates["beta"][..., None] * momentum, gates["beta"] * accumulated
    memory, mix = memory + momentum, mix + accumulated
    accumulated = jnp.where(here, own, accumulated)
  solving = Solving(
    momentum,
    jnp.where(here[..., None], online.features, before.features),
    jnp.where(here[..., None], online.answers, before.answers),
    jnp.where(here, own, mix),
    accumulated,
  )
  return Chunk(chunk.memory | {last: memory}, solving)


def _start_read(
  start: State, fresh: Weights, incoming: jax.Array | None, dtype: jnp.dtype, c: Coefficients | Prior | None = None
) -> Linear:
  """Reads A_t W_0, and with it what M_0 regains, where W_0 is M_0 of documents that start in the chunk; None: A = 1."""
  decay, regained = (None, None) if c is None else (_column_of(c.decay), _column_of(c.regained))

  def read(name, x):
    before = _weighed(decay, x, start.memory[name], dtype)
    if regained is None:
      return before if incoming is None else jnp.where(incoming, before, _weighed(decay, x, fresh[name], dtype))
    if incoming is None:
      return before + _weighed(regained, x, fresh[name], dtype)
    return jnp.where(incoming, before, 0.0) + _weighed(jnp.where(incoming, regained, 1.0), x, fresh[name], dtype)

  return read


def _weighed(weights: jax.Array | None, x: jax.Array, w: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """weights_t x_t W, weighing the narrower of x and the product: weights [..., T, 1], x [..., T, in], W [..., in, out].

  Not the product where both are as wide: its gradient would need it again.
  """
  if weights is None:
    return product(x, w, dtype)
  if w.shape[-1] < w.shape[-2]:
    return weights * product(x, w, dtype)
  return product(weights * x, w, dtype)


def _before_writes(
  linear: Linear,
  start: State,
  fresh: Weights,
  last: str,
  incoming: jax.Array | None,
  prior: Prior,
  dtype: jnp.dtype,
) -> Linear:
  """Reads A'_t W_0 + c'_t S_0, and what M_0 regained, in the last layer, and by `linear` W_0 in the others."""
  faded = _start_read(start, fresh, incoming, dtype, prior)

  def read(name, x):
    if name != last:
      return linear(name, x)
    y = faded(name, x)
    if prior.carry is not None:
      carried = _weighed(prior.carry, x, start.momentum[name], dtype)
      y += carried if incoming is None else jnp.where(incoming, carried, 0.0)
    return y

  return read


class Decays(NamedTuple):
  """Products of a gate over tokens r, inside each document: total over r <= t [..., T], since over i < r <= t
  [..., T, T]."""

  total: jax.Array
  since: jax.Array


def _decays(gate: jax.Array | None, same: jax.Array, dtype: jnp.dtype) -> Decays:
  """The products at each token t; gate [..., T], None for 1.

  From differences of cumulative logs, masked BEFORE the exponential: ratios of products, or masking after it, are inf
  and NaN within 256 tokens in float32.
  """
  if gate is None:
    return Decays(None, same.astype(dtype))
  logs = _masked_sums(same, jnp.log(jnp.maximum(gate, jnp.finfo(gate.dtype).tiny)))
  return Decays(jnp.exp(logs), jnp.exp(jnp.where(same, _column(logs) - logs[..., None, :], -jnp.inf)))


def _column_of(x: jax.Array | None) -> jax.Array | None:
  return None if x is None else _column(x)


@jax.custom_vjp
def _column(x: jax.Array) -> jax.Array:
  """[..., T] to [..., T, 1]; on a TPU a number per token goes from lanes to sublanes.

  Not every TPU has an instruction for the way back, but all can transpose.
  """
  return x[..., None]


_column.defvjp(
  lambda x: (_column(x), None),
  lambda _, g: (jnp.swapaxes(jnp.broadcast_to(g, (*g.shape[:-1], 128)), -1, -2)[..., 0, :],),
)


@jax.custom_vjp
def _masked_sums(mask: jax.Array, x: jax.Array) -> jax.Array:
  """sum_j mask_tj x_j to x's full precision: mask [..., T, T] bool, x [..., T] to [..., T]."""
  return _exact_product(x, jnp.swapaxes(mask, -1, -2))


_masked_sums.defvjp(
  lambda mask, x: (_masked_sums(mask, x), mask), lambda mask, cotangent: (None, _exact_product(cotangent, mask))
)


def _exact_product(x: jax.Array, mask: jax.Array) -> jax.Array:
  """x @ mask: [..., T] and [..., T, T] bool to [..., T].

  A float32 number is the sum of three bfloat16 ones, which one pass of a TPU's matrix unit multiplies by the mask.
  """
  if x.dtype != jnp.float32:
    return product(x[..., None, :], mask, x.dtype)[..., 0, :]
  parts = []
  for _ in range(3):
    parts.append(triangular.truncated(x))
    x -= parts[-1]
  return product(jnp.stack(parts, -2), mask, jnp.bfloat16).sum(-2)


def _last(x: jax.Array, count: int, seen: Visible) -> jax.Array:
  """The last document's last `count` keys, zero where it has fewer: [..., J, d] to [..., count, d].

  Padding at the end leaves the window as it was: it ends at the last key of the document.
  """
  keys = x.shape[-2]
  position = positions(keys - count, keys)
  end = jnp.where(seen.last, position, -keys).max(-1, keepdims=True)
  before_end = count - 1 - jax.lax.broadcasted_iota(jnp.int32, (count, keys), 0)
  pick = (end - before_end == position) & seen.last
  return product(pick, x, x.dtype).astype(x.dtype)
