"""The write pass across devices: what a device's first segment starts from.

Independent segments need nothing from each other. Under carry="checkpoint" a segment starts from the state of the one
before it, which may be on another device:

* Where a state is an affine map of an earlier one, whatever that is (`rule.transition`), each device sums up its
  own segments first, an associative scan over the devices adds these sums up, and then all write at the same time.
* Elsewhere (deep memories) a device must wait for the state to arrive. The batch's rows and heads go through the
  devices in groups, as in a pipeline: with G groups on P devices a device idles for P - 1 of G + P - 1 turns.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mc_jax.memory import xla
from mc_jax.memory.arithmetic import product, state_dtype
from mc_jax.memory.networks import Weights
from mc_jax.memory.rules import Rule, State
from mc_jax.memory.tokens import Tokens
from mc_jax.memory.xla import Written
from mc_jax.parallel.parts import Parts, largest_divisor

Pytree = Any

# Groups for each device that is waited for: the share of idle turns is then 1 / (1 + this) at most.
_GROUPS_PER_PART = 4


def write(
  parts: Parts,
  local: Callable[..., Written],
  rule: Rule,
  fresh: Weights,
  tokens: Tokens,
  lengths: tuple[int, ...],
  *,
  read: xla.Read,
  carries: bool,
  side_by_side: int,
) -> Written:
  """`xla.write` of the segments here; `local` does it where the state that comes in is known."""
  tokens = tokens._replace(u=None, token_scores=None)
  run = functools.partial(local, rule, lengths=lengths, read=read, carries=carries, side_by_side=side_by_side)
  if not carries:
    return run(fresh, tokens)
  if rule.transition is not None:
    return run(fresh, tokens, start=_composed_start(parts, rule, fresh, tokens, lengths))
  marks = tokens.documents
  return _pipeline(run, rule, parts, _groups(parts, tokens), fresh, tokens._replace(documents=None), marks)


def _composed_start(parts: Parts, rule: Rule, fresh: Weights, tokens: Tokens, lengths: tuple[int, ...]) -> State:
  """The state that comes in, of M_end = decay M_start + written: an associative scan of (decay, written).

  decay is a number a head, one for each channel, or a matrix, see `Rule.transition`.
  """
  first = parts.index() == 0
  start = rule.start(fresh, tokens.k)
  own = start._replace(memory=jax.tree.map(functools.partial(jnp.where, first), start.memory, rule.empty(start.memory)))
  if rule.lookback:
    tail = tuple(parts.ahead(x[..., -rule.lookback :, :]) for x in (tokens.k, tokens.v))
    if tokens.documents is not None:  # the window's tokens of the document that goes on here
      number, before, valid = tokens.documents
      owner = parts.ahead(jnp.where(valid, number, -1)[..., -rule.lookback :])
      tail = tuple(jnp.where((owner == before[..., :1])[..., None], x, 0) for x in tail)
    start, own = start._replace(tail=tail), own._replace(tail=tail)
  if rule.transition == "matrix":
    decay, written = _as_matrix(rule, fresh, own, tokens, lengths)
    join, compose = _joined_by_matrix, _composed_matrices
  else:
    written = _end(rule, fresh, own, tokens, lengths)
    decay = rule.decay(tokens.gates, state_dtype(tokens.k.dtype))
    join, compose = rule.joined, operator.mul
    if tokens.documents is not None:
      goes_on = tokens.documents.number[..., -1] == tokens.documents.before[..., 0]
      decay = jnp.where(goes_on[..., None, None], decay, 0.0)

  step, nothing = 1, rule.empty(written)
  while step < parts.count:
    reached = parts.index() >= step  # zeros come to those that have nobody so far ahead of them
    earlier = {name: jnp.where(reached, parts.ahead(w, step), nothing[name]) for name, w in written.items()}
    written = join(decay, earlier, written)
    decay = compose(decay, parts.ahead(decay, step))
    step *= 2
  memory = {name: jnp.where(first, m, parts.ahead(written[name])) for name, m in start.memory.items()}
  return start._replace(memory=memory)


def _end(rule: Rule, fresh: Weights, start: State, tokens: Tokens, lengths: tuple[int, ...]) -> Weights:
  """The memory after these tokens."""
  written = xla.write(rule, fresh, tokens, lengths, read=xla.read_nothing, carries=True, side_by_side=1, start=start)
  return written.end.memory


def _as_matrix(
  rule: Rule, fresh: Weights, start: State, tokens: Tokens, lengths: tuple[int, ...]
) -> tuple[jax.Array, Weights]:
  """What these tokens make of a memory W: (Phi [b, h, in, in], U) of Phi W + U.

  Columns of a matrix are written apart from each other. So Phi is what becomes of the unit matrix where every value is
  zero, which new documents begin from nothing, and is written beside U in one pass.
  """
  (name, w), (new,) = *start.memory.items(), fresh.values()
  width = w.shape[-2]
  unit = jnp.broadcast_to(jnp.eye(width, dtype=w.dtype), (*w.shape[:-1], width))
  nothing = jnp.zeros((*tokens.v.shape[:-1], width), tokens.v.dtype)
  both = _end(
    rule,
    {name: jnp.concatenate([jnp.zeros((*new.shape[:-1], width), new.dtype), new], -1)},
    start._replace(memory={name: jnp.concatenate([unit, w], -1)}),
    tokens._replace(v=jnp.concatenate([nothing, tokens.v], -1)),
    lengths,
  )[name]
  return both[..., :width], {name: both[..., width:]}


def _joined_by_matrix(phi: jax.Array, before: Weights, written: Weights) -> Weights:
  """`Rule.joined` of a matrix; one of zeros is the end of a document."""
  ends = (phi == 0).all((-1, -2), keepdims=True)
  return {
    name: w + jnp.where(ends, 0.0, product(phi, jnp.where(ends, 0.0, before[name]), w.dtype))
    for name, w in written.items()
  }


def _composed_matrices(later: jax.Array, earlier: jax.Array) -> jax.Array:
  """What two stretches in a row leave of what came in."""
  return product(later, earlier, later.dtype)


def _groups(parts: Parts, tokens: Tokens) -> tuple[int, int]:
  """The numbers of groups of rows and of heads."""
  rows, heads = tokens.k.shape[:2]
  enough = _GROUPS_PER_PART * (parts.count - 1)
  by_rows = largest_divisor(rows, enough)
  return by_rows, largest_divisor(heads, -(-enough // by_rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _pipeline(run, rule, parts, groups, fresh, tokens, marks):
  """The write pass of the segments here, each group of rows and heads when its state arrives.

  The states that arrived are kept for the backward pass, one for each row and head, which comes back along the
  devices with their gradients.
  """
  return _pipeline_forward(run, rule, parts, groups, fresh, tokens, marks)[0]


def _from_arrived(run, rule, first, fresh, arrived, tokens, marks) -> Written:
  start = rule.start(fresh, tokens.k)
  start = jax.tree.map(lambda new, old: jnp.where(first, new, old), start, arrived)
  written = run(fresh, tokens._replace(documents=marks), start=start)
  nothing = dict.fromkeys(written.states._fields)
  return written._replace(states=type(written.states)(**nothing | {"memory": written.states.memory}))  # M is cached


def _pipeline_forward(run, rule, parts, groups, fresh, tokens, marks):
  part, count = parts.index(), groups[0] * groups[1]
  local = functools.partial(_from_arrived, run, rule, part == 0)
  state = rule.start(fresh, tokens.k)
  arrived = jax.tree.map(jnp.zeros_like, state)
  shapes = jax.eval_shape(local, fresh, state, tokens, marks)._replace(end=None)
  written = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def turn(t, carry):
    i = t - part

    def active(carry):
      arriving, arrived, written = carry
      out = local(_pick(groups, i, fresh, None), arriving, _pick(groups, i, tokens), _pick(groups, i, marks))
      arrived = _put(groups, i, arrived, arriving)
      y, states = _put(groups, i, written.y, out.y), _put(groups, i, written.states, out.states, 1)
      return out.end, arrived, Written(y, states, None)

    end, *kept = lax.cond((i >= 0) & (i < count), active, lambda carry: carry, carry)
    return jax.tree.map(parts.ahead, end), *kept

  carry = _pick(groups, jnp.int32(0), arrived), arrived, written
  _, arrived, written = lax.fori_loop(0, parts.count + count - 1, turn, carry)
  return written, (fresh, arrived, tokens, marks)


def _pipeline_backward(run, rule, parts, groups, residuals, cotangent):
  fresh, arrived, tokens, marks = residuals
  part, count = parts.index(), groups[0] * groups[1]
  local = functools.partial(_from_arrived, run, rule, part == 0)

  def turn(t, carry):
    i = t - (parts.count - 1 - part)

    def active(carry):
      d_end, d_fresh, d_tokens = carry
      inputs = _pick(groups, i, fresh, None), _pick(groups, i, arrived), _pick(groups, i, tokens)
      _, pull = jax.vjp(lambda *args: local(*args, _pick(groups, i, marks)), *inputs)
      d_states = _pick(groups, i, cotangent.states, 1)
      d_f, d_arrived, d_t = pull(Written(_pick(groups, i, cotangent.y), d_states, d_end))
      d_f = jax.tree.map(jnp.add, _pick(groups, i, d_fresh, None), d_f)
      return d_arrived, _put(groups, i, d_fresh, d_f, None), _put(groups, i, d_tokens, d_t)

    d_start, *kept = lax.cond((i >= 0) & (i < count), active, lambda carry: carry, carry)
    return jax.tree.map(parts.back, d_start), *kept

  carry = jax.tree.map(jnp.zeros_like, (_pick(groups, jnp.int32(0), arrived), fresh, tokens))
  _, d_fresh, d_tokens = lax.fori_loop(0, parts.count + count - 1, turn, carry)
  return d_fresh, d_tokens, None


_pipeline.defvjp(_pipeline_forward, _pipeline_backward)


def _corner(x: jax.Array, groups: tuple[int, int], i: jax.Array, rows: int | None):
  """Where a group's rows and heads begin in x, and the shape that they have."""
  heads = 0 if rows is None else rows + 1
  start, shape = [jnp.int32(0)] * x.ndim, list(x.shape)
  for axis, pieces, j in ((rows, groups[0], i // groups[1]), (heads, groups[1], i % groups[1])):
    if axis is not None and not (axis == heads and x.shape[axis] == 1):  # what all heads share has one
      shape[axis] //= pieces
      start[axis] = (j * shape[axis]).astype(jnp.int32)
  return start, shape


def _pick(groups: tuple[int, int], i: jax.Array, arrays: Pytree, rows: int | None = 0) -> Pytree:
  """The i-th group's part of arrays whose axes from `rows` on are rows and heads; of [heads, ...] if it is None."""
  return jax.tree.map(lambda x: lax.dynamic_slice(x, *_corner(x, groups, i, rows)), arrays)


def _put(groups: tuple[int, int], i: jax.Array, arrays: Pytree, part: Pytree, rows: int | None = 0) -> Pytree:
  """Arrays with the i-th group's part replaced."""

  def put(x, part):
    return lax.dynamic_update_slice(x, part, _corner(x, groups, i, rows)[0])

  return jax.tree.map(put, arrays, part)
