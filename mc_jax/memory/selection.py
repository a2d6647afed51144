"""Reading the few memories that each token selected (arXiv:2602.24281, Eq. 17): a mixture of experts, which are caches.

(token, slot) pairs are sorted by the memory they chose and read in blocks of one memory each; cost k / n of reading
them all. Stacked states are {name: [n, batch, heads, in, out]}.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mc_jax.memory.aggregate import ReadNetwork
from mc_jax.memory.arithmetic import state_dtype
from mc_jax.memory.networks import Network, Weights


def read_selected(network: Network, q: jax.Array, index: jax.Array, gates: jax.Array, states: Weights) -> jax.Array:
  """sum over a token's selected memories of gamma M(q).

  Args:
    network: the memory's network.
    q: [b, h, length, d].
    index: [b, h, length, k] int, the memories chosen.
    gates: [b, h, length, k]; where 0 the slot is empty.
    states: {name: [n, b, h, in, out]}.

  Returns:
    [b, h, length, out], at least float32.
  """

  def read_blocks(x, gates, owner, states):
    gates = gates[..., None]
    return gates * jnp.where(gates == 0, 0.0, _read_in_turn(network, x, owner, states))

  return select_and_read(read_blocks, 32, q, index, gates, states)


def read_few(
  network: Network, q: jax.Array, index: jax.Array, gates: jax.Array, fetch: Callable[[jax.Array], Weights]
) -> jax.Array:
  """`read_selected` for single tokens: fetches each one's memories, slot by slot.

  Args:
    q, index, gates: as of `read_selected`, length 1.
    fetch: index [b, h] to those memories, {name: [b, h, in, out]}.
  """
  y = 0.0
  for slot in range(index.shape[-1]):
    gate = gates[..., slot, None]
    y += jnp.where(gate == 0, 0.0, gate * ReadNetwork(network)(q, fetch(index[:, :, 0, slot])))
  return y


def select_and_read(
  read_blocks: Callable[[jax.Array, jax.Array, jax.Array, Weights], jax.Array],
  block: int,
  q: jax.Array,
  index: jax.Array,
  gates: jax.Array,
  states: Weights,
) -> jax.Array:
  """`read_selected`, its blocks of `block` tokens read by a function handed in.

  read_blocks: (x [b, h, blocks, block, d], gates [b, h, blocks, block], owner [b, h, blocks] int32 ascending, states)
  to gated answers [b, h, blocks, block, out], 0 where a gate is. Every memory owns a block at least; an owner of n
  marks a block that nobody looks at.
  """
  index, gates = jnp.moveaxis(index, -1, 2), jnp.moveaxis(gates, -1, 2)
  layout = _layout(index, lax.stop_gradient(gates), len(jax.tree.leaves(states)[0]), block)
  x, gates = spread(q, layout), _spread_gates(gates, layout)
  blocks = (*layout.owner.shape, block)
  y = read_blocks(x.reshape(*blocks, x.shape[-1]), gates.reshape(blocks), layout.owner, states)
  return _combine(y.reshape(*y.shape[:2], -1, y.shape[-1]), layout)


class Layout(NamedTuple):
  """Where (slot, token) pairs go, so that every block of places belongs to one memory.

  Attributes:
    owner: [b, h, blocks] int32, the memory of each block, ascending; n for blocks of no pairs.
    pair: [b, h, places] int32, what is in each place, slot * length + token; from k * length on, nothing.
    gate: [b, h, places], its gate; 0 for nothing.
    place: [b, h, k, length] int32, where each pair is.
  """

  owner: jax.Array
  pair: jax.Array
  gate: jax.Array
  place: jax.Array


def _layout(index: jax.Array, gates: jax.Array, memories: int, block: int) -> Layout:
  """Sorts pairs [b, h, k, length] by the memory they chose, with as many fillers as make every memory's blocks whole.

  A memory that nobody chose has a block of fillers. Empty slots, whose gate is 0, come last, in blocks of no memory. By
  sorts alone, because a TPU is at its worst at looking up single numbers.
  """
  chosen = jnp.where(gates == 0, memories, index).reshape(*index.shape[:2], -1)
  pairs, names = chosen.shape[-1], jnp.arange(memories)
  sizes = (chosen[..., None, :] == names[:, None]).sum(-1)
  lacking = jnp.where(sizes == 0, block, -sizes % block)
  fillers = jnp.where(jnp.arange(block) < lacking[..., None], names[:, None], memories)
  keys = jnp.concatenate([chosen, fillers.reshape(*chosen.shape[:-1], -1)], -1).astype(jnp.int32)
  rest = -keys.shape[-1] % block
  keys = jnp.pad(keys, ((0, 0), (0, 0), (0, rest)), constant_values=memories)
  gates = jnp.pad(gates.reshape(chosen.shape), ((0, 0), (0, 0), (0, keys.shape[-1] - pairs)))
  places = lax.broadcasted_iota(jnp.int32, keys.shape, 2)
  keys, pair, gates = lax.sort((keys, places, gates), num_keys=1, is_stable=False)
  _, place = lax.sort((pair, places), num_keys=1, is_stable=False)
  return Layout(keys[..., ::block], pair, gates, place[..., :pairs].reshape(index.shape))


def take(x: jax.Array, index: jax.Array) -> jax.Array:
  """Rows of x: [b, h, n, d], [b, h, m] int to [b, h, m, d]."""
  return jnp.take_along_axis(x, index[..., None], axis=-2, mode="clip")


def take_pairs(x: jax.Array, layout: Layout) -> jax.Array:
  """What is in every pair's place: x [b, h, places, d] to [b, h, k, length, d]."""
  place = layout.place
  return take(x, place.reshape(*place.shape[:2], -1)).reshape(*place.shape, x.shape[-1])


# Every pair has one place: a gather, or a sort, does what the transpose of a gather would scatter.


@jax.custom_vjp
def spread(q: jax.Array, layout: Layout) -> jax.Array:
  """The query in every place: q [b, h, length, d] to [b, h, places, d]; anything where there is no pair."""
  return take(q, layout.pair % q.shape[2])


spread.defvjp(
  lambda q, layout: (spread(q, layout), layout),
  lambda layout, cotangent: (_sum_of_pairs(cotangent, layout).astype(cotangent.dtype), None),
)


@jax.custom_vjp
def _spread_gates(gates: jax.Array, layout: Layout) -> jax.Array:
  """The gate in every place: gates [b, h, k, length] to [b, h, places]; 0 where there is no pair."""
  return layout.gate


def _spread_gates_backward(layout, cotangent):
  shape = layout.place.shape
  _, d_gates = lax.sort((layout.pair, cotangent), num_keys=1, is_stable=False)
  return d_gates[..., : shape[2] * shape[3]].reshape(shape), None


_spread_gates.defvjp(lambda gates, layout: (layout.gate, layout), _spread_gates_backward)


@jax.custom_vjp
def _combine(y: jax.Array, layout: Layout) -> jax.Array:
  """The sum over a token's slots: y [b, h, places, d] to [b, h, length, d], at least float32."""
  return _sum_of_pairs(y, layout)


def _combine_backward(residuals, cotangent):
  layout, like = residuals
  # Anything in places of no pair: their gates are 0.
  return take(cotangent.astype(like.dtype), layout.pair % cotangent.shape[2]), None


_combine.defvjp(lambda y, layout: (_combine(y, layout), (layout, jnp.empty((0,), y.dtype))), _combine_backward)


def _sum_of_pairs(x: jax.Array, layout: Layout) -> jax.Array:
  # Slot by slot: for a sum over their axis XLA:TPU takes ten times as long.
  slots = jnp.unstack(layout.place, axis=2)
  return sum(take(x, place).astype(state_dtype(x.dtype)) for place in slots)


def _read_in_turn(network: Network, x: jax.Array, owner: jax.Array, states: Weights) -> jax.Array:
  """M^(owner)(x) block by block, each multiplied by its memory, gathered, a few at a time."""
  states = {name: jnp.moveaxis(w, 0, 2) for name, w in states.items()}  # [b, h, n, in, out]
  memories, blocks = jax.tree.leaves(states)[0].shape[2], owner.shape[-1]
  together = max(1, memories // 4)  # blocks whose gathered memories exist at one time
  steps = -(-blocks // together)

  def cut(x):
    x = jnp.pad(x, [(0, 0)] * 2 + [(0, steps * together - blocks)] + [(0, 0)] * (x.ndim - 3))
    return jnp.moveaxis(x.reshape(*x.shape[:2], steps, together, *x.shape[3:]), 2, 0)

  y = _read_blocks(network, cut(x), cut(jnp.minimum(owner, memories - 1)), states)
  y = jnp.moveaxis(y, 0, 2)
  return y.reshape(*y.shape[:2], -1, *y.shape[4:])[:, :, :blocks]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read_blocks(network: Network, x: jax.Array, owner: jax.Array, states: Weights) -> jax.Array:
  """M^(owner)(x): x [steps, b, h, g, block, d], owner [steps, b, h, g], states {name: [b, h, n, in, out]}."""

  def read(_, xs):
    return None, ReadNetwork(network)(xs[0], _gather(states, xs[1]))

  return lax.scan(read, None, (x, owner))[1]


def _read_blocks_forward(network, x, owner, states):
  return _read_blocks(network, x, owner, states), (x, owner, states)


def _read_blocks_backward(network, residuals, cotangent):
  x, owner, states = residuals
  batch, heads = (
    jnp.arange(n).reshape(shape) for n, shape in zip(owner.shape[1:3], ((-1, 1, 1), (1, -1, 1)), strict=True)
  )

  def read(totals, xs):
    x, owner, cotangent = xs
    _, pull = jax.vjp(ReadNetwork(network), x, _gather(states, owner))
    x_part, state_part = pull(cotangent)
    # In place: through the transpose of the gather every step would add up n states.
    return jax.tree.map(lambda total, part: total.at[batch, heads, owner].add(part), totals, state_part), x_part

  state_totals, x_total = lax.scan(read, jax.tree.map(jnp.zeros_like, states), (x, owner, cotangent))
  return x_total, None, state_totals


_read_blocks.defvjp(_read_blocks_forward, _read_blocks_backward)


def _gather(states: Weights, owner: jax.Array) -> Weights:
  return {name: jnp.take_along_axis(w, owner[..., None, None], axis=2) for name, w in states.items()}
