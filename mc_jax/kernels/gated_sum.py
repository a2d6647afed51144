"""Gated sums over stacked states, sum_i gate_i contribution(x, state_i): Pallas TPU kernels, forward and backward.

The contribution is handed in as a pure function and runs inside the kernels, its gradient by `jax.vjp` there. The grid
walks the (tile of tokens, block of states) pairs that have something to read, so that states stream through VMEM and
nothing of [tokens, states, width] exists:

  forward    tile by tile; the sum of a tile stays in VMEM while its states pass.
  backward   block by block; the gradients of a block of states stay in VMEM while its tiles pass, and so do x, the
             cotangent and x's gradient for all tokens (or a stripe of them), which are thus moved once. One kernel for
             all gradients computes each contribution once; two, one for x and one for the states, would do it twice.
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

from mc_jax.kernels import cost, vmem

States = Any  # a pytree of arrays
Contribution = Callable[[jax.Array, States], jax.Array]

_LANES, _SUBLANES = 128, 8
# What a grid step should do at least: it has about 350 bundles of its own, as long as 50 MFLOP take.
_STEP_FLOPS = 1 << 28


def query_tile(contribution: Contribution, x: jax.Array, states: States) -> int:
  """How many tokens should read together: enough for a grid step's work, and no more than VMEM has room for.

  Args:
    contribution, x, states: as in `gated_sum`, or their shapes.
  """
  longest = pl.cdiv(x.shape[1], _LANES) * _LANES
  flops = cost.work(contribution, *_one(x, states, _LANES)).flops // _LANES
  tile = 512 if _SUBLANES * 512 * flops >= _STEP_FLOPS else 1024
  width = max(x.shape[-1], *(max(w.shape[2:]) for w in jax.tree.leaves(states)))
  # The backward pass has some six float32 values of the widest layer at a time.
  while tile > _LANES and 6 * 4 * tile * width > vmem.budget() // 4:
    tile //= 2
  return min(tile, longest)


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

  States from a tile's count on are not read for it, nor is anything added to their gradients. Where a gate is 0 the
  contribution is dropped, not multiplied.

  Args:
    contribution: (x [1, T, in], states with leaves [1, in, out]) to [1, T, out], at least float32; token by token.
    x: [rows, length, in], bfloat16 or float32.
    gates: [n, rows, length] float32, length last: as [..., length, 1] they would take 128 times their size.
    states: a pytree of [n, rows, in, out]. In the dtype that they are multiplied in they are half the bytes to fetch.
    counts: [ceil(length / tile)] int. The cost estimate is exact unless they are traced; then it is that of all.
    tile: how many tokens read together, a multiple of 128 (see `query_tile`).
    interpret: as in `pl.pallas_call`.

  Returns:
    [rows, length, out], at least float32.

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
  stripe = _stripe(x, cotangent, tile)
  x_grads, gates_grads, state_grads = [], [], []
  for start in range(0, len(counts), stripe):
    tokens = slice(start * tile, (start + stripe) * tile)
    here = counts[start : start + stripe]
    parts = x[:, tokens], gates[..., tokens], states, here, cotangent[:, tokens]
    for grads, grad in zip(
      (x_grads, gates_grads, state_grads), _backward(contribution, tile, interpret, *parts), strict=True
    ):
      grads.append(grad)
  states_grad = jax.tree.map(lambda w, *grads: sum(grads).astype(w.dtype), states, *state_grads)
  return jnp.concatenate(x_grads, 1), jnp.concatenate(gates_grads, -1), states_grad, None


_gated_sum.defvjp(_gated_sum_forward, _gated_sum_backward)


def _forward(contribution, tile, interpret, x, gates, states, counts):
  rows, length, width = x.shape
  n = len(gates)
  leaves, tree = jax.tree.flatten(states)
  work = cost.work(contribution, *_one(x, states, tile))
  together = _together(n, work)
  walk = _walk(counts, together, n, by_tile=True)
  out = jax.eval_shape(contribution, *_one(x, states, tile))

  def kernel(tile_ref, block_ref, counts_ref, x_ref, gates_ref, *refs):
    *state_refs, y_ref = refs
    step = pl.program_id(1)
    block = block_ref[step]
    total = 0.0
    for i in range(together):
      state = block * together + i
      y = contribution(x_ref[...], tree.unflatten(ref[i] for ref in state_refs))
      gate = jnp.where(state < counts_ref[tile_ref[step]], _row(gates_ref, block, i, together), 0.0)
      # With many small contributions a step the transposing units are busier than the matrix units, which take one.
      as_column = _column_by_product if i == _SUBLANES - 1 else column
      gate = as_column(gate, y.shape[-1])
      total += jnp.where(gate == 0, 0.0, gate * y)
    y_ref[...] = total + jnp.where(block == 0, 0.0, y_ref[...])

  y = jax.ShapeDtypeStruct((rows, length, out.shape[-1]), out.dtype)
  expected = walk if isinstance(counts, np.ndarray) else _walk(_half(counts, n), together, n, by_tile=True)
  states_read = _fetched(expected.block, together, n)
  return pl.pallas_call(
    kernel,
    out_shape=y,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(rows, walk.steps),
      in_specs=[_tile_spec(tile, width), _gates_spec(n, together, tile), *_state_specs(together, leaves)],
      out_specs=_tile_spec(tile, out.shape[-1]),
    ),
    compiler_params=_compiler_params(),
    cost_estimate=pl.CostEstimate(
      flops=rows * expected.steps * together * work.flops,
      transcendentals=rows * expected.steps * together * work.transcendentals,
      bytes_accessed=_bytes(x)
      + _bytes(y)
      + rows * _gates_bytes(expected, n, together, tile)
      + sum(_bytes(w) * states_read // n for w in leaves),
    ),
    interpret=interpret,
    name="cached_read_fwd",
  )(walk.tile, walk.block, walk.counts, x, _rows_first(gates, together), *leaves)


def _backward(contribution, tile, interpret, x, gates, states, counts, cotangent):
  """Gradients of x, gates and states."""
  rows, length, width = x.shape
  n = len(gates)
  leaves, tree = jax.tree.flatten(states)

  def contribute(x, memory, gate, cotangent):
    y, pull = jax.vjp(contribution, x, memory)
    return y, *pull((gate * cotangent).astype(y.dtype))

  out = jax.eval_shape(contribution, *_one(x, states, tile))
  work = cost.work(contribute, *_one(x, states, tile), out, out)
  together = _together(n, work)
  blocks = pl.cdiv(n, together)
  walk = _walk(counts, together, n, by_tile=False)

  def kernel(tile_ref, block_ref, counts_ref, x_ref, gates_ref, cotangent_ref, *refs):
    state_refs, (x_grad_ref, gates_grad_ref), refs = (
      refs[: len(leaves)],
      refs[len(leaves) :][:2],
      refs[len(leaves) + 2 :],
    )
    state_grad_refs, x_total_ref, state_total_refs = refs[: len(leaves)], refs[len(leaves)], refs[len(leaves) + 1 :]
    step = pl.program_id(1)
    block, here = block_ref[step], tile_ref[step]
    first = (step == 0) | (block_ref[jnp.maximum(step - 1, 0)] != block)
    tokens = pl.ds(pl.multiple_of(here * tile, tile), tile)
    x, cotangent = x_ref[:, tokens], cotangent_ref[:, tokens]
    x_total = jnp.where(block == 0, 0.0, x_total_ref[tokens])
    gate_parts = []
    for i in range(together):
      state = block * together + i
      used = state < counts_ref[here]
      gate = column(_row(gates_ref, block, i, together), cotangent.shape[-1])
      y, x_part, state_part = contribute(x, tree.unflatten(ref[i] for ref in state_refs), gate, cotangent)
      x_total += jnp.where(used, x_part[0].astype(jnp.float32), 0.0)
      # A transposition and a sum over sublanes; a sum over lanes takes longer, and v4 cannot make a row of it.
      gate_parts.append(jnp.where(gate == 0, 0.0, y[0] * cotangent[0]).T.sum(0, keepdims=True))
      for total_ref, ref, part in zip(state_total_refs, state_grad_refs, jax.tree.leaves(state_part), strict=True):
        total = jnp.where(first, 0.0, total_ref[i]) + jnp.where(used, part[0].astype(jnp.float32), 0.0)
        total_ref[i] = total
        ref[i, 0] = total.astype(ref.dtype)
    x_total_ref[tokens] = x_total
    x_grad_ref[0, tokens] = x_total.astype(x_grad_ref.dtype)
    gates_grad_ref[0, 0] = jnp.concatenate(gate_parts)

  def gates_grad_index(row, step, tiles, blocks, counts):
    return row, blocks[step], 0, tiles[step]

  gates_grad_spec = pl.BlockSpec((1, 1, together, tile), gates_grad_index)
  row_spec, state_specs = _row_spec(length, width), _state_specs(together, leaves)
  expected = walk if isinstance(counts, np.ndarray) else _walk(_half(counts, n), together, n, by_tile=False)
  x_grad, gates_grad, *state_grads = pl.pallas_call(
    kernel,
    out_shape=[
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct((rows, blocks, together, length), gates.dtype),
      *(jax.ShapeDtypeStruct(w.shape, w.dtype) for w in leaves),
    ],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(rows, walk.steps),
      in_specs=[row_spec, _gates_spec(n, together, tile), _row_spec(length, cotangent.shape[-1]), *state_specs],
      out_specs=[row_spec, gates_grad_spec, *state_specs],
      scratch_shapes=[
        pltpu.VMEM((length, width), jnp.float32),
        *(pltpu.VMEM((together, *w.shape[2:]), jnp.float32) for w in leaves),
      ],
    ),
    compiler_params=_compiler_params(),
    cost_estimate=pl.CostEstimate(
      flops=rows * expected.steps * together * work.flops,
      transcendentals=rows * expected.steps * together * work.transcendentals,
      bytes_accessed=2 * _bytes(x)
      + _bytes(cotangent)
      + 2 * sum(map(_bytes, leaves))
      + rows * (_gates_bytes(expected, n, together, tile) + expected.steps * 4 * together * tile),
    ),
    interpret=interpret,
    name="cached_read_bwd",
  )(walk.tile, walk.block, walk.counts, x, _rows_first(gates, together), cotangent, *leaves)
  gates_grad = jnp.swapaxes(gates_grad.reshape(rows, -1, length)[:, :n], 0, 1)
  # Pairs that were not visited were not written.
  read = jnp.repeat(jnp.arange(n)[:, None] < walk.counts, tile, axis=1, total_repeat_length=length)
  return x_grad, jnp.where(read[:, None], gates_grad, 0.0), tree.unflatten(state_grads)


class _Walk(NamedTuple):
  """The pairs that a grid visits, in order.

  Attributes:
    tile, block: int32, `steps` of them that count.
    counts: [tiles] int32, how many states a tile reads.
    steps: how many pairs are visited; traced if counts are.
  """

  tile: jax.Array
  block: jax.Array
  counts: jax.Array
  steps: int | jax.Array


def _walk(counts: np.ndarray | jax.Array, together: int, n: int, *, by_tile: bool) -> _Walk:
  """Pairs with something to read, tile by tile or block by block.

  And one for every tile, and for every block if block by block, so that every sum is written at least once.
  """
  xp = np if isinstance(counts, np.ndarray) else jnp
  block = xp.arange(pl.cdiv(n, together))
  visited = block * together < xp.maximum(counts, 1)[:, None]
  if not by_tile:
    visited = (visited | (xp.arange(len(counts)) == len(counts) - 1)[:, None]).T
  order = xp.argsort(~visited.reshape(-1), stable=True).astype(np.int32)
  outer, inner = order // visited.shape[1], order % visited.shape[1]
  tile, block = (outer, inner) if by_tile else (inner, outer)
  steps = visited.sum(dtype=np.int32)
  if xp is np:
    steps = int(steps)
    tile, block = tile[:steps], block[:steps]
  return _Walk(tile, block, counts.astype(np.int32), steps)


def _half(counts: jax.Array, n: int) -> np.ndarray:
  """What traced counts are taken to be: a token reads what came before it, the mean token half of everything."""
  return np.full(len(counts), pl.cdiv(n, 2))


def _together(n: int, work: cost.Work) -> int:
  """How many states a grid step takes: a power of two, up to the 8 whose gates lie in one tile of VMEM."""
  together = 1
  while 2 * together <= min(n, _SUBLANES) and together * work.flops < _STEP_FLOPS:
    together *= 2
  return together


def _stripe(x: jax.Array, cotangent: jax.Array, tile: int) -> int:
  """How many tiles the backward pass takes at a time: what stays in VMEM for them has half of it."""
  widths = [pl.cdiv(width, _LANES) * _LANES for width in (x.shape[-1], cotangent.shape[-1])]
  # x and its gradient and the cotangent in two buffers each, and the float32 sum.
  token = widths[0] * (4 * x.dtype.itemsize + 4) + widths[1] * 2 * cotangent.dtype.itemsize
  return max(1, vmem.budget() // 2 // (token * tile))


def _one(x: jax.Array, states: States, tile: int) -> tuple[jax.ShapeDtypeStruct, States]:
  """The shapes that a contribution gets."""
  one = jax.tree.map(lambda w: jax.ShapeDtypeStruct((1, *w.shape[2:]), w.dtype), states)
  return jax.ShapeDtypeStruct((1, tile, x.shape[-1]), x.dtype), one


def _rows_first(gates: jax.Array, together: int) -> jax.Array:
  """[n, rows, length] to [rows, n, length], n padded to whole blocks if all of them lie in one tile of 8."""
  padding = -len(gates) % together if len(gates) < _SUBLANES else 0
  return jnp.pad(jnp.swapaxes(gates, 0, 1), ((0, 0), (0, padding), (0, 0)))


def _row(gates_ref: Any, block: jax.Array, i: int, together: int) -> jax.Array:
  """The gates of the block's i-th state, [1, T], from the tile of 8 that they lie in."""
  first = 0 if together == _SUBLANES else lax.rem(block, jnp.int32(_SUBLANES // together)) * together
  return gates_ref[0, pl.ds(first + i, 1)]


def column(row: jax.Array, width: int) -> jax.Array:
  """One number per token, [1, T], to [T, width]: copied over sublanes, which is free, then transposed."""
  column = jnp.broadcast_to(row, (_LANES, row.shape[1])).T
  return jnp.concatenate([column] * pl.cdiv(width, _LANES), axis=1)[:, :width]


def _column_by_product(row: jax.Array, width: int) -> jax.Array:
  """The same, exact too, by the matrix unit: a float32 is the sum of three bfloat16."""
  parts, rest = [], row
  for _ in range(3):
    bits = lax.bitcast_convert_type(rest, jnp.int32) & -(1 << 16)  # by its bits: compilers drop casts there and back
    parts.append(lax.bitcast_convert_type(bits, jnp.float32))
    rest = rest - parts[-1]
  parts = jnp.concatenate(parts).astype(jnp.bfloat16)
  ones = jnp.ones((len(parts), width), jnp.bfloat16)
  return lax.dot_general(parts, ones, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _tile_spec(tile: int, width: int) -> pl.BlockSpec:
  return pl.BlockSpec((1, tile, width), lambda row, step, tiles, blocks, counts: (row, tiles[step], 0))


def _row_spec(length: int, width: int) -> pl.BlockSpec:
  return pl.BlockSpec((1, length, width), lambda row, step, tiles, blocks, counts: (row, 0, 0))


def _gates_spec(n: int, together: int, tile: int) -> pl.BlockSpec:
  def index(row, step, tiles, blocks, counts):
    return row, lax.div(blocks[step], jnp.int32(_SUBLANES // together)), tiles[step]

  return pl.BlockSpec((1, min(pl.cdiv(n, together) * together, _SUBLANES), tile), index)


def _state_specs(together: int, leaves: list[jax.Array]) -> list[pl.BlockSpec]:
  def index(row, step, tiles, blocks, counts):
    return blocks[step], row, 0, 0

  return [pl.BlockSpec((together, 1, *w.shape[2:]), index) for w in leaves]


def _compiler_params() -> pltpu.CompilerParams:
  # All indices come from _walk; checking them again takes a grid step some bundles.
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem.budget(), disable_bounds_checks=True
  )


def _bytes(x: jax.Array) -> int:
  return x.size * x.dtype.itemsize


def _changes(*index: np.ndarray) -> np.ndarray:
  """The steps before which a block is fetched: the first, and those with another index than the one before."""
  return np.flatnonzero(np.any([np.diff(i, prepend=-1) != 0 for i in index], axis=0))


def _fetched(block: np.ndarray, together: int, n: int) -> int:
  """How many states a row's steps fetch."""
  return int(np.minimum(together, n - block[_changes(block)] * together).sum())


def _gates_bytes(walk: _Walk, n: int, together: int, tile: int) -> int:
  states = min(pl.cdiv(n, together) * together, _SUBLANES)
  return len(_changes(walk.block * together // _SUBLANES, walk.tile)) * states * tile * 4
