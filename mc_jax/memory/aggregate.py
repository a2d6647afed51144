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


def read_gated(network: Network, q: jax.Array, gates: jax.Array, states: Weights, count: jax.Array) -> jax.Array:
  """sum_i gamma_i M^(i)(q) over the first `count` memories (Eq. 7, 9): whole networks, one after the other.

  q [b, h, T, d], gates [b, h, T, n], states {name: [n, b, h, in, out]} to [b, h, T, d], at least float32.
  """

  return gated_sum(functools.partial(_read_block, network), q, jnp.moveaxis(gates, -1, 0), states, count)


def read_layer(x: jax.Array, gates: jax.Array, states: jax.Array, count: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """x sum_i gamma_i W^(i): one layer of a soup (Eq. 14-15), read without building it.

  x [b, h, T, in], gates [b, h, T, n], states [n, b, h, in, out] to [b, h, T, out], at least float32.
  """

  def contribution(x, memory):
    return product(x, memory["w"], dtype)

  return gated_sum(contribution, x, jnp.moveaxis(gates, -1, 0), {"w": states}, count)


def read_selected(
  network: Network, q: jax.Array, index: jax.Array, gates: jax.Array, states: Weights, *, block: int = 32
) -> jax.Array:
  """sum over a token's selected memories of gamma M(q) (Eq. 17): a mixture of experts whose experts are the caches.

  (token, slot) pairs are sorted by the memory they chose and read by a grouped product; cost k / n of `read_gated`.

  Args:
    network: the memory's network.
    q: [b, h, length, d].
    index: [b, h, length, k] int, the memories chosen.
    gates: [b, h, length, k]; where 0 the slot is empty.
    states: {name: [n, b, h, in, out]}.
    block: tokens per block, off TPU.

  Returns:
    [b, h, length, d], at least float32.
  """
  length, slots = index.shape[-2:]
  states = {name: jnp.moveaxis(w, 0, 2) for name, w in states.items()}  # [b, h, n, in, out]
  chosen = index.reshape(*index.shape[:-2], length * slots)
  order = jnp.argsort(chosen, axis=-1)
  chosen = jnp.take_along_axis(chosen, order, axis=-1)
  rows = jnp.take_along_axis(q, (order // slots)[..., None], axis=-2)  # [b, h, pairs, d], sorted by memory
  y = lax.platform_dependent(
    rows,
    chosen,
    states,
    tpu=functools.partial(_grouped_ragged, network),
    default=functools.partial(_grouped_blocks, network, block),
  )
  y = jnp.take_along_axis(y, jnp.argsort(order, axis=-1)[..., None], axis=-2)  # unsorted
  y = y.reshape(*index.shape, y.shape[-1])
  gates = gates[..., None]
  return jnp.where(gates == 0, 0.0, gates * y).sum(-2)


def _sizes(chosen: jax.Array, states: Weights) -> jax.Array:
  """How many of the sorted rows each memory reads: [b, h, pairs] to [b, h, n]."""
  memories = jnp.arange(jax.tree.leaves(states)[0].shape[2])
  return (chosen[..., None] == memories).sum(-2, dtype=jnp.int32)


def _grouped_ragged(network: Network, rows: jax.Array, chosen: jax.Array, states: Weights) -> jax.Array:
  """M(row) for rows [b, h, pairs, d] sorted by the memory they chose [b, h, pairs], by `jax.lax.ragged_dot`."""
  dtype, wide = rows.dtype, state_dtype(rows.dtype)
  sizes = _sizes(chosen, states).reshape(-1)
  flat = {name: w.reshape(-1, *w.shape[-2:]).astype(dtype) for name, w in states.items()}

  def linear(name, x):
    return lax.ragged_dot(x.astype(dtype), flat[name], sizes, preferred_element_type=wide)

  return network(rows.reshape(-1, rows.shape[-1]), linear).astype(wide).reshape(rows.shape)


def _grouped_blocks(network: Network, block: int, rows: jax.Array, chosen: jax.Array, states: Weights) -> jax.Array:
  """The same off TPU, where `ragged_dot` costs a product over all rows for every memory.

  Each memory's rows are padded to whole blocks, and each block multiplied by its memory, gathered, a few at a time.
  """
  batch, heads, pairs, width = rows.shape
  sizes = _sizes(chosen, states)
  memories = sizes.shape[-1]
  together = max(1, memories // 4)  # blocks whose gathered memories exist at one time
  steps = -(-(-(-pairs // block) + memories) // together)  # enough for a partly filled last block of every memory
  take = functools.partial(jnp.take_along_axis, axis=-1)

  used = -(-sizes // block)
  first = jnp.cumsum(used, -1) - used  # every memory's first block
  row = jnp.cumsum(sizes, -1) - sizes  # and first row
  blocks = jnp.arange(steps * together)
  owner = jnp.minimum((blocks >= (first + used)[..., None]).sum(-2), memories - 1)
  source = (take(row, owner) + (blocks - take(first, owner)) * block)[..., None] + jnp.arange(block)
  source = jnp.minimum(source, pairs - 1).reshape(batch, heads, -1)  # the row in each place of each block
  place = take(first, chosen) * block + jnp.arange(pairs) - take(row, chosen)  # the place of each row

  x = jnp.take_along_axis(rows, source[..., None], axis=-2).reshape(batch, heads, steps, together, block, width)
  owner = owner.reshape(batch, heads, steps, together)
  y = _read_blocks(network, jnp.moveaxis(x, 2, 0), jnp.moveaxis(owner, 2, 0), states)
  y = jnp.moveaxis(y, 0, 2).reshape(batch, heads, -1, width)
  return jnp.take_along_axis(y, place[..., None], axis=-2)


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


def _gather(states: Weights, owner: jax.Array) -> Weights:
  return {name: jnp.take_along_axis(w, owner[..., None, None], axis=2) for name, w in states.items()}
