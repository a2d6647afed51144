"""Reading selected memories across devices: a query goes to the device whose memory it chose, and an answer comes back.

Exchanges have fixed shapes: each device can send a fixed number of queries to each earlier device, and queries that do
not fit go in another round, until all are answered. A sequence's first memories
are seen by most tokens: the room for the device `by` places back is a share of 1 / (by + 1) of all queries, and half as
much again.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from mc_jax.memory import selection
from mc_jax.memory.arithmetic import state_dtype
from mc_jax.memory.networks import Network, Weights
from mc_jax.parallel import mesh
from mc_jax.parallel.parts import Parts

_SPARE = 1.5


def read_selected(
  parts: Parts,
  local: Callable[..., jax.Array],
  network: Network,
  q: jax.Array,
  index: jax.Array,
  gates: jax.Array,
  states: Weights,
) -> jax.Array:
  """`selection.read_selected` of the queries here, index being that of the whole sequence's memories.

  q [b, h, length, d], index and gates [b, h, length, k], states {name: [n, b, h, in, out]}. `local` is
  `selection.read_selected` of what is here.
  """
  n = len(next(iter(states.values())))
  away = jnp.where(gates == 0, 0, parts.index() - index // n)  # how many parts back
  away = jnp.maximum(away, 0)  # a gate that is no number may be that of a later memory
  here = jnp.where((away == 0) & (gates != 0), gates, 0.0)
  y = local(network, q, jnp.where(away == 0, index % n, 0), here, states)
  room = rooms(parts, q, y, index.shape[-1])
  return y + _exchange(functools.partial(local, network), parts, room, q, (away, index % n), gates, states)


def rooms(parts: Parts, q: jax.Array, y: jax.Array, k: int) -> tuple[int, ...]:
  """The number of queries of each row and head that fit, to the device 1, 2, ... places back.

  A query q [b, h, length, d] goes there, and an answer y [b, h, length, out] comes back.
  """
  rows, pairs = q.shape[0] * q.shape[1], q.shape[2] * k
  wanted = [min(1.0, _SPARE / (by + 1)) for by in range(1, parts.count)]
  most = parts.buffer / (rows * sum(x.shape[-1] * jnp.dtype(x.dtype).itemsize for x in (q, y)))
  shrink = min(1.0, most / (sum(wanted) * pairs))
  return tuple(min(pairs, 8 * max(1, math.ceil(share * shrink * pairs / 8))) for share in wanted)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _exchange(read, parts, room, q, chosen, gates, states):
  """The sum over a token's choices on other devices, [b, h, length, out]."""

  def add(i, total):
    return total + _round(read, parts, room, i, q, chosen, gates, states)

  like = jax.eval_shape(functools.partial(_round, read, parts, room, 0), q, chosen, gates, states)
  return lax.fori_loop(0, _rounds(room, chosen[0]), add, jnp.zeros(like.shape, like.dtype))


def _exchange_forward(read, parts, room, *args):
  return _exchange(read, parts, room, *args), args


def _exchange_backward(read, parts, room, residuals, cotangent):
  q, chosen, gates, states = residuals

  def add(i, totals):
    def one_round(q, gates, states):
      return _round(read, parts, room, i, q, chosen, gates, states)

    return jax.tree.map(jnp.add, totals, jax.vjp(one_round, q, gates, states)[1](cotangent))

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, state_dtype(x.dtype)), (q, gates, states))
  totals = lax.fori_loop(0, _rounds(room, chosen[0]), add, zeros)
  d_q, d_gates, d_states = jax.tree.map(lambda d, x: d.astype(x.dtype), totals, (q, gates, states))
  return d_q, None, d_gates, d_states


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _rounds(room: tuple[int, ...], away: jax.Array) -> jax.Array:
  """How many rounds it takes until every query was answered: the same on all devices, or they would wait for ever."""
  sizes = jnp.stack([(away == by + 1).sum((-1, -2)) for by in range(len(room))], -1)
  return lax.pmax((-(-sizes // jnp.array(room))).max(), mesh.AXES)


def _round(read, parts, room, i, q, chosen, gates, states):
  layout, gates, wanted = _layout(room, i, chosen, gates)
  x = selection.spread(q, layout)
  ends = [sum(room[: by + 1]) for by in range(len(room))]

  def exchanged(x, send):
    pieces = jnp.split(x, ends, axis=2)[:-1]
    return jnp.concatenate([send(piece, by + 1) for by, piece in enumerate(pieces)], 2)

  x, wanted = exchanged(x, parts.back), exchanged(wanted, parts.back)
  filled = (wanted > 0).astype(gates.dtype)[..., None]
  y = exchanged(read(x, jnp.maximum(wanted - 1, 0)[..., None], filled, states), parts.ahead)
  y = jnp.pad(y, ((0, 0), (0, 0), (0, 1), (0, 0)))  # the place of the others
  return _combine(y, gates, layout)


@jax.custom_vjp
def _combine(y: jax.Array, gates: jax.Array, layout: selection.Layout) -> jax.Array:
  """The gated sum over a token's slots: y [b, h, places, d], gates [b, h, k, length] to [b, h, length, d]."""
  return _combine_forward(y, gates, layout)[0]


def _combine_forward(y, gates, layout):
  y, gate = selection.take_pairs(y, layout), gates[..., None]
  return jnp.where(gate == 0, 0.0, gate * y).sum(2), (y, gates, layout)


def _combine_backward(residuals, cotangent):
  y, gates, layout = residuals
  d_gates = jnp.where(gates == 0, 0.0, (cotangent[:, :, None] * y).sum(-1))
  gate = layout.gate[..., None]
  d_y = jnp.where(gate == 0, 0.0, gate * selection.take(cotangent, layout.pair % gates.shape[-1]))
  return d_y.astype(y.dtype), d_gates, None


_combine.defvjp(_combine_forward, _combine_backward)


def _layout(room, i, chosen, gates):
  """Where the i-th round's queries go.

  Returns:
    The layout of (slot, token) pairs in places: room for those to the device 1, 2, ... places back, and one for all
    the others; the gates of this round's pairs, [b, h, k, length], 0 for others; in each place 1 + the memory that is
    asked for, 0 for none, [b, h, places].
  """
  away, memory, gates = (jnp.moveaxis(x, -1, 2) for x in (*chosen, gates))
  shape = gates.shape
  away, memory, flat = (x.reshape(*x.shape[:2], -1) for x in (away, memory, lax.stop_gradient(gates)))
  key = jnp.where(away == 0, len(room) + 1, away).astype(jnp.int32)
  pair = lax.broadcasted_iota(jnp.int32, key.shape, 2)
  key, pair, memory, flat = lax.sort((key, pair, memory.astype(jnp.int32), flat), num_keys=1, is_stable=True)

  rank = lax.broadcasted_iota(jnp.int32, key.shape, 2)
  places = sum(room)
  place, taken, base = jnp.full(key.shape, places, jnp.int32), [], 0
  start = jnp.zeros(key.shape[:2], jnp.int32)
  for by, most in enumerate(room, start=1):
    count = (key == by).sum(-1)
    offset = rank - start[..., None] - i * most
    place = jnp.where((key == by) & (offset >= 0) & (offset < most), base + offset, place)
    first = start + i * most
    here = jnp.arange(most) < (count - i * most)[..., None]
    taken.append([jnp.where(here, _window(x, first, most), 0) for x in (pair, memory + 1, flat)])
    base, start = base + most, start + count
  taken = [jnp.concatenate([*xs, jnp.zeros_like(xs[0][..., :1])], -1) for xs in zip(*taken, strict=True)]
  _, place = lax.sort((pair, place), num_keys=1, is_stable=False)
  place = place.reshape(shape)
  layout = selection.Layout(None, taken[0], taken[2], place)
  return layout, jnp.where(place < places, gates, 0.0), taken[1]


def _window(x: jax.Array, first: jax.Array, size: int) -> jax.Array:
  """x[first : first + size] of each row and head: x [b, h, pairs], first [b, h]."""
  x = jnp.pad(x, ((0, 0), (0, 0), (0, size)))
  cut = functools.partial(lax.dynamic_slice_in_dim, slice_size=size)
  return jax.vmap(jax.vmap(cut))(x, jnp.minimum(first, x.shape[-1] - size))
