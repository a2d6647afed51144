"""Reading cached memories (arXiv:2602.24281, section 3): all of them, gated, or the few that were selected.

A read is a plain function of (queries, gates, stacked states), in long query tiles; writing, in short chunks, is
online.py's. Stacked states are {name: [n, batch, heads, in, out]}.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from mc_jax.memory.networks import Network, Weights
from mc_jax.memory.online import dense, product, state_dtype

NAMES = ("none", "residual", "grm", "soup", "ssc")

Contribution = Callable[[jax.Array, Weights], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_sum(
  contribution: Contribution, x: jax.Array, gates: jax.Array, states: Weights, count: jax.Array
) -> jax.Array:
  """sum_{i < count} gamma_i contribution(x, M^(i)): one accumulator, through which the states stream.

  Memories from `count` on are not touched, forward or backward: what is not yet cached costs nothing and cannot leak.
  No [n, tokens, ...] array exists; the backward pass computes each contribution again.

  Args:
    contribution: (x [b, h, T, in], {name: [b, h, in, out]}) to [b, h, T, out].
    x: [b, h, T, in].
    gates: [n, b, h, T]. Where a gate is 0 the memory's contribution is dropped, not multiplied.
    states: {name: [n, b, h, in, out]}.
    count: int, may be traced.
  """
  shape = jax.eval_shape(contribution, x, _at(states, 0))

  def add(i, total):
    gate = gates[i][..., None]
    return total + jnp.where(gate == 0, 0.0, gate * contribution(x, _at(states, i)))

  return lax.fori_loop(0, count, add, jnp.zeros(shape.shape, shape.dtype))


def _gated_sum_forward(contribution, x, gates, states, count):
  return gated_sum(contribution, x, gates, states, count), (x, gates, states, count)


def _gated_sum_backward(contribution, residuals, cotangent):
  x, gates, states, count = residuals

  def add(i, totals):
    x_total, gate_totals, state_totals = totals
    y, pull = jax.vjp(contribution, x, _at(states, i))
    gate = gates[i]
    x_part, state_part = pull((gate[..., None] * cotangent).astype(y.dtype))
    gate_part = jnp.where(gate == 0, 0.0, (y * cotangent).sum(-1))
    put = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
    return x_total + x_part, put(gate_totals, gate_part), jax.tree.map(put, state_totals, state_part)

  wide = state_dtype(x.dtype)
  zeros = (jnp.zeros(x.shape, wide), jnp.zeros_like(gates), jax.tree.map(jnp.zeros_like, states))
  x_total, gate_totals, state_totals = lax.fori_loop(0, count, add, zeros)
  return x_total.astype(x.dtype), gate_totals, state_totals, None


gated_sum.defvjp(_gated_sum_forward, _gated_sum_backward)


def _at(states: Weights, i: jax.Array) -> Weights:
  return {name: lax.dynamic_index_in_dim(w, i, 0, keepdims=False) for name, w in states.items()}


def whole(network: Network) -> Contribution:
  """M(x): what a cached memory contributes to residual and grm (Eq. 7, 9), its hidden layers included."""
  return functools.partial(_read_block, network)


def layer(name: str) -> Contribution:
  """x W: what a cached memory contributes to one layer of a soup (Eq. 14-15)."""
  return functools.partial(_read_layer, name)


def read_selected(network: Network, q: jax.Array, index: jax.Array, gates: jax.Array, states: Weights) -> jax.Array:
  """sum over a token's selected memories of gamma M(q) (Eq. 17): a mixture of experts whose experts are the caches.

  (token, slot) pairs are sorted by the memory they chose and read in blocks of one memory each; cost k / n of reading
  them all.

  Args:
    network: the memory's network.
    q: [b, h, length, d].
    index: [b, h, length, k] int, the memories chosen.
    gates: [b, h, length, k]; where 0 the slot is empty.
    states: {name: [n, b, h, in, out]}.

  Returns:
    [b, h, length, d], at least float32.
  """
  return select_and_read(functools.partial(_read_in_turn, network), 32, q, index, gates, states)


def select_and_read(
  read_blocks: Callable[[jax.Array, jax.Array, Weights], jax.Array],
  block: int,
  q: jax.Array,
  index: jax.Array,
  gates: jax.Array,
  states: Weights,
) -> jax.Array:
  """`read_selected`, its blocks of `block` tokens read by a function handed in.

  read_blocks: (x [b, h, blocks, block, d], owner [b, h, blocks] int32 ascending, states) to y like x. An owner of n
  marks a block that nobody looks at.
  """
  slots, memories = index.shape[-1], jax.tree.leaves(states)[0].shape[0]
  chosen = index.reshape(*index.shape[:-2], -1)
  order = jnp.argsort(chosen, axis=-1)
  chosen = jnp.take_along_axis(chosen, order, axis=-1)
  pairs = chosen.shape[-1]
  take = functools.partial(jnp.take_along_axis, axis=-1)

  # Each memory's pairs are padded to whole blocks.
  sizes = (chosen[..., None] == jnp.arange(memories)).sum(-2, dtype=jnp.int32)
  used = -(-sizes // block)
  first = jnp.cumsum(used, -1) - used  # every memory's first block
  row = jnp.cumsum(sizes, -1) - sizes  # and first pair
  blocks = jnp.arange(-(-pairs // block) + memories)  # enough for a partly filled last block of every memory
  owner = (blocks >= (first + used)[..., None]).sum(-2, dtype=jnp.int32)
  known = jnp.minimum(owner, memories - 1)
  source = (take(row, known) + (blocks - take(first, known)) * block)[..., None] + jnp.arange(block)
  source = jnp.minimum(source, pairs - 1).reshape(*chosen.shape[:2], -1)  # the pair in each place of each block
  place = take(first, chosen) * block + jnp.arange(pairs) - take(row, chosen)  # the place of each pair

  x = jnp.take_along_axis(q, (take(order, source) // slots)[..., None], axis=-2)
  y = read_blocks(x.reshape(*owner.shape, block, -1), owner, states)
  y = y.reshape(*chosen.shape[:2], -1, y.shape[-1])
  y = jnp.take_along_axis(y, take(place, jnp.argsort(order, axis=-1))[..., None], axis=-2)  # unsorted
  y, gates = y.reshape(*index.shape, -1), gates[..., None]
  return jnp.where(gates == 0, 0.0, gates * y).sum(-2)


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
    return None, _read_block(network, xs[0], _gather(states, xs[1]))

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
    _, pull = jax.vjp(functools.partial(_read_block, network), x, _gather(states, owner))
    x_part, state_part = pull(cotangent)
    # In place: through the transpose of the gather every step would add up n states.
    return jax.tree.map(lambda total, part: total.at[batch, heads, owner].add(part), totals, state_part), x_part

  state_totals, x_total = lax.scan(read, jax.tree.map(jnp.zeros_like, states), (x, owner, cotangent))
  return x_total, None, state_totals


_read_blocks.defvjp(_read_blocks_forward, _read_blocks_backward)


def _read_block(network: Network, x: jax.Array, memory: Weights) -> jax.Array:
  return network(x, dense(memory, x.dtype)).astype(state_dtype(x.dtype))


def _read_layer(name: str, x: jax.Array, memory: Weights) -> jax.Array:
  return product(x, memory[name], x.dtype)


def _gather(states: Weights, owner: jax.Array) -> Weights:
  return {name: jnp.take_along_axis(w, owner[..., None, None], axis=2) for name, w in states.items()}
