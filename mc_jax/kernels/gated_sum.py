"""Gated sums over stacked states, sum_i gate_i contribution(x, state_i): Pallas TPU kernels, forward and backward.

The contribution is handed in as a pure function and runs inside the kernels, its gradient by `jax.vjp` there. The grid
walks the (tile of tokens, block of states) pairs that have something to read, so that states stream through VMEM and
nothing of [tokens, states, width] exists:

  forward    tile by tile; the sum of a tile stays in VMEM while its states pass.
  backward   block by block; the gradients of a block of states stay in VMEM while its tiles pass, and so do x, the
             cotangent and x's gradient for all tokens (or a stripe of them), which are thus moved once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mc_jax.kernels import vmem

States = Any  # a pytree of arrays
Contribution = Callable[[jax.Array, States], jax.Array]

_LANES = 128


class _Walk(NamedTuple):
  """The pairs that a grid visits, in order.

  Attributes:
    tile, block: [most] int32.
    counts: [tiles] int32, how many states a tile reads.
    steps: how many pairs are visited; traced if counts are.
    most: how many there are at most, a plain int.
  """

  tile: jax.Array
  block: jax.Array
  counts: jax.Array
  steps: int | jax.Array
  most: int


def gated_sum(
  contribution: Contribution,
  x: jax.Array,
  gates: jax.Array,
  states: States,
  counts: Sequence[int] | np.ndarray | jax.Array,
  tile: int,
  *,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """sum_{i < count} gate_i contribution(x, state_i), every tile of `tile` tokens with a count of its own.

  States from a tile's count on are not read for it, nor their gradients touched. Where a gate is 0 the contribution is
  dropped, not multiplied.

  Args:
    contribution: (x [1, T, in], states with leaves [1, in, out]) to [1, T, out], at least float32; token by token.
    x: [rows, length, in], bfloat16 or float32.
    gates: [n, rows, length] float32, length last: as [..., length, 1] they would take 128 times their size.
    states: a pytree of [n, rows, in, out].
    counts: [ceil(length / tile)] int. If they are not traced, the grid and the cost estimate are exact.
    tile: how many tokens read together, a multiple of 128.
    interpret: as in `pl.pallas_call`.

  Returns:
    [rows, length, out], float32.

  Raises:
    ValueError: tile or counts do not fit.
  """
  length = x.shape[1]
  tiles = pl.cdiv(length, tile)
  if tile < 1 or tile % _LANES:
    raise ValueError(f"tile must be a multiple of {_LANES} tokens, got {tile}")
  if len(counts) != tiles:
    raise ValueError(f"counts must have an entry for each of the {tiles} tiles, got {len(counts)}")
  padding = tiles * tile - length
  x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
  gates = jnp.pad(gates, ((0, 0), (0, 0), (0, padding)))
  known = None
  if not isinstance(counts, jax.Array):
    known, counts = tuple(int(c) for c in counts), None
  return _gated_sum(contribution, tile, known, interpret, x, gates, states, counts)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _gated_sum(contribution, tile, known, interpret, x, gates, states, counts):
  return _gated_sum_forward(contribution, tile, known, interpret, x, gates, states, counts)[0]


def _gated_sum_forward(contribution, tile, known, interpret, x, gates, states, counts):
  y = _forward(contribution, tile, interpret, x, gates, states, counts if known is None else np.array(known, np.int32))
  return y, (x, gates, states, counts)


def _gated_sum_backward(contribution, tile, known, interpret, residuals, cotangent):
  x, gates, states, counts = residuals
  counts = counts if known is None else np.array(known, np.int32)
  return *_backward(contribution, tile, interpret, x, gates, states, counts, cotangent), None


_gated_sum.defvjp(_gated_sum_forward, _gated_sum_backward)


def _forward(contribution, tile, interpret, x, gates, states, counts):
  rows, length, width = x.shape
  leaves, tree = jax.tree.flatten(states)
  together = min(len(gates), _TOGETHER)
  gates, blocks = _blocked(gates, together)
  walk = _walk(counts, together, blocks, by_tile=True)
  out = _contribution_shape(contribution, x, states, tile)

  def kernel(tile_ref, block_ref, counts_ref, x_ref, gates_ref, *refs):
    *state_refs, y_ref = refs
    step = pl.program_id(1)
    block = block_ref[step]
    index = block * together + lax.broadcasted_iota(jnp.int32, (together, 1), 0)
    gates = jnp.where(index < counts_ref[tile_ref[step]], gates_ref[0, 0], 0.0)
    total = jnp.where(block == 0, 0.0, y_ref[...])
    for i in range(together):
      y = contribution(x_ref[...], tree.unflatten(ref[i] for ref in state_refs))
      gate = _column(gates[i], y.shape[-1])
      total += jnp.where(gate == 0, 0.0, gate * y)
    y_ref[...] = total

  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((rows, length, out.shape[-1]), out.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(rows, walk.steps),
      in_specs=[_tile_spec(tile, width), _gates_spec(together, tile), *_state_specs(together, leaves)],
      out_specs=_tile_spec(tile, out.shape[-1]),
    ),
    compiler_params=_compiler_params(),
    interpret=interpret,
    name="cached_read_fwd",
  )(walk.tile, walk.block, walk.counts, x, gates, *leaves)


def _backward(contribution, tile, interpret, x, gates, states, counts, cotangent):
  rows, length, width = x.shape
  n, tiles = len(gates), len(counts)
  leaves, tree = jax.tree.flatten(states)
  together = min(n, _TOGETHER_BACKWARD)
  blocked, blocks = _blocked(gates, together)
  walk = _walk(counts, together, blocks, by_tile=False)

  def kernel(tile_ref, block_ref, counts_ref, x_ref, gates_ref, cotangent_ref, *refs):
    state_refs, (x_grad_ref, gates_grad_ref), refs = (
      refs[: len(leaves)],
      refs[len(leaves) :][:2],
      refs[len(leaves) + 2 :],
    )
    state_grad_refs, x_total_ref = refs[:-1], refs[-1]
    step = pl.program_id(1)
    block, here = block_ref[step], tile_ref[step]
    fresh = (step == 0) | (block_ref[jnp.maximum(step - 1, 0)] != block)
    tokens = pl.ds(pl.multiple_of(here * tile, tile), tile)
    x, cotangent = x_ref[:, tokens], cotangent_ref[:, tokens]
    x_total = jnp.where(block == 0, 0.0, x_total_ref[tokens])
    gate_grads = []
    for i in range(together):
      used = block * together + i < counts_ref[here]
      y, pull = jax.vjp(contribution, x, tree.unflatten(ref[i] for ref in state_refs))
      gate = _column(gates_ref[0, 0, i], y.shape[-1])
      x_part, state_part = pull((gate * cotangent).astype(y.dtype))
      x_total += jnp.where(used, x_part[0].astype(jnp.float32), 0.0)
      gate_grads.append(jnp.where(gate == 0, 0.0, y[0] * cotangent[0]).sum(-1))
      for ref, part in zip(state_grad_refs, jax.tree.leaves(state_part), strict=True):
        ref[i] = jnp.where(fresh, 0.0, ref[i]) + jnp.where(used, part.astype(jnp.float32), 0.0)
    x_total_ref[tokens] = x_total
    x_grad_ref[0, tokens] = x_total.astype(x_grad_ref.dtype)
    gates_grad_ref[0, 0] = jnp.stack(gate_grads)

  state_specs = _state_specs(together, leaves)
  x_grad, gates_grad, *state_grads = pl.pallas_call(
    kernel,
    out_shape=[
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct(blocked.shape, blocked.dtype),
      *(jax.ShapeDtypeStruct(w.shape, jnp.float32) for w in leaves),
    ],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(rows, walk.steps),
      in_specs=[
        _row_spec(length, width),
        _gates_spec(together, tile),
        _row_spec(length, cotangent.shape[-1]),
        *state_specs,
      ],
      out_specs=[_row_spec(length, width), _gates_spec(together, tile), *state_specs],
      scratch_shapes=[pltpu.VMEM((length, width), jnp.float32)],
    ),
    compiler_params=_compiler_params(),
    interpret=interpret,
    name="cached_read_bwd",
  )(walk.tile, walk.block, walk.counts, x, blocked, cotangent, *leaves)
  gates_grad = jnp.swapaxes(gates_grad.reshape(rows, -1, length)[:, :n], 0, 1)
  # Pairs that were not visited were not written.
  read = jnp.repeat(jnp.arange(n)[:, None] < walk.counts, tile, axis=1, total_repeat_length=length)
  gates_grad = jnp.where(read[:, None], gates_grad, 0.0)
  state_grads = [grad.astype(w.dtype) for grad, w in zip(state_grads, leaves, strict=True)]
  return x_grad, gates_grad, tree.unflatten(state_grads)


_TOGETHER = 2
_TOGETHER_BACKWARD = 1


def _contribution_shape(contribution, x, states, tile):
  one = jax.tree.map(lambda w: jax.ShapeDtypeStruct((1, *w.shape[2:]), w.dtype), states)
  return jax.eval_shape(contribution, jax.ShapeDtypeStruct((1, tile, x.shape[-1]), x.dtype), one)


def _column(row: jax.Array, width: int) -> jax.Array:
  """One number per token, [T] along lanes, to [T, width]: copied over sublanes (free), then transposed.

  On the transposing unit that is half the work of a lane broadcast of a column.
  """
  return jnp.broadcast_to(row[None], (width, len(row))).T


def _blocked(gates: jax.Array, together: int) -> tuple[jax.Array, int]:
  """[n, rows, length] to [rows, blocks, together, length], and how many blocks."""
  n, rows, length = gates.shape
  blocks = pl.cdiv(n, together)
  gates = jnp.pad(jnp.swapaxes(gates, 0, 1), ((0, 0), (0, blocks * together - n), (0, 0)))
  return gates.reshape(rows, blocks, together, length), blocks


def _walk(counts: np.ndarray | jax.Array, together: int, blocks: int, *, by_tile: bool) -> _Walk:
  """Pairs with something to read, tile by tile or block by block.

  And one for every tile, and for every block if block by block, so that every sum is written at least once.
  """
  xp = np if isinstance(counts, np.ndarray) else jnp
  visited = xp.arange(blocks) * together < xp.maximum(counts, 1)[:, None]
  if not by_tile:
    visited = (visited | (xp.arange(len(counts)) == len(counts) - 1)[:, None]).T
  order = xp.argsort(~visited.reshape(-1), stable=True).astype(np.int32)
  outer, inner = order // visited.shape[1], order % visited.shape[1]
  tile, block = (outer, inner) if by_tile else (inner, outer)
  steps = visited.sum(dtype=np.int32)
  if xp is np:
    return _Walk(tile[:steps], block[:steps], counts, int(steps), int(steps))
  return _Walk(tile, block, counts, steps, visited.size)


def _tile_spec(tile: int, width: int) -> pl.BlockSpec:
  return pl.BlockSpec((1, tile, width), lambda row, step, tiles, blocks, counts: (row, tiles[step], 0))


def _row_spec(length: int, width: int) -> pl.BlockSpec:
  return pl.BlockSpec((1, length, width), lambda row, step, tiles, blocks, counts: (row, 0, 0))


def _gates_spec(together: int, tile: int) -> pl.BlockSpec:
  return pl.BlockSpec(
    (1, 1, together, tile), lambda row, step, tiles, blocks, counts: (row, blocks[step], 0, tiles[step])
  )


def _state_specs(together: int, leaves: list[jax.Array]) -> list[pl.BlockSpec]:
  return [
    pl.BlockSpec((together, 1, *w.shape[2:]), lambda row, step, tiles, blocks, counts: (blocks[step], row, 0, 0))
    for w in leaves
  ]


def _compiler_params() -> pltpu.CompilerParams:
  return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem.budget())
