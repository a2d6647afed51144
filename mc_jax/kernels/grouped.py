"""A function of blocks of tokens, each with the state that it chose: a Pallas TPU kernel, forward and backward.

Blocks come sorted by the state that owns them, so a state is fetched once for all its blocks, and its gradient stays in
VMEM while they pass. The function is handed in and runs whole inside the kernels, its gradient by `jax.vjp` there: what
a network has between its layers never leaves VMEM, where a grouped matrix product a layer would write it to HBM.

Why not the grouped products that JAX has: docs/kernels.md compares the bytes. ragged_dot is a kernel too, but its
gradient in the states is lowered to a dense product over all groups; megablox sends hidden layers through HBM.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mc_jax.kernels import cost, vmem
from mc_jax.kernels.gated_sum import column

Pytree = Any
Function = Callable[[jax.Array, Pytree], jax.Array]


def block_size(function: Function, width: int, states: Pytree) -> int | None:
  """Tokens of a block: 256, or 128, as the backward kernel's VMEM has it; None if even they do not fit.

  Larger blocks have better rates (512: 62% forward on v5e) and more padding, half a block a state. A block of 128 has
  596 bundles forward on v5e, one of 256 844.

  Args:
    function, states: as in `grouped`.
    width: The width of a token's x.
  """
  one = [w.shape[2:] for w in jax.tree.leaves(states)]
  state = 4 * sum(math.prod(shape) for shape in one)
  y = jax.eval_shape(function, *_one(jax.ShapeDtypeStruct((1, 1, 128, width), jnp.float32), states))
  answer, widest = y.shape[-1], max(shape[-1] for shape in one)
  for tokens in (256, 128):
    # The state and its gradient twice, while the next are on their way; what is added to it; the state as multiplied.
    # A block's x, cotangent and gradient, twice; gates in columns, and what they weigh; three of the widest arrays
    # between the layers.
    if 5.5 * state + tokens * (16 * width + 8 * answer + 12 * widest) <= vmem.budget():
      return tokens
  return None


def grouped(
  function: Function,
  x: jax.Array,
  gates: jax.Array,
  owner: jax.Array,
  states: Pytree,
  *,
  expected_blocks: int | None = None,
  name: str = "selected_read",
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """y of every block is gate * function(x of the block, the state that owns the block).

  Args:
    function: (x [1, T, in], states' leaves [1, a, b]) to [1, T, out], pure.
    x: [rows, blocks, T, in], T a multiple of 8 (float32) or 16 (bfloat16) tokens, better of 128.
    gates: [rows, blocks, T] float32, one a token. Where 0 the answer is dropped, not multiplied.
    owner: [rows, blocks] int32, ascending along each row, every state at least once: its gradient is written with its
      blocks. A block whose owner is `states` or more is empty.
    states: arrays [states, rows, a, b].
    expected_blocks: how many of a row's blocks will not be empty, for the cost estimate; None: all.
    name: the kernels are called name_fwd and name_bwd.
    interpret: as in `pl.pallas_call`.

  Returns:
    [rows, blocks, T, out] in x's dtype; zero in empty blocks, as is the gradient in their x and gates.
  """
  expected = x.shape[1] if expected_blocks is None else min(expected_blocks, x.shape[1])
  return _grouped(function, expected, name, interpret, x, gates[:, :, None], owner, states)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _grouped(function, expected, name, interpret, x, gates, owner, states):
  y = jax.eval_shape(function, *_one(x, states))
  y = jax.ShapeDtypeStruct((*x.shape[:2], *y.shape[1:]), x.dtype)
  count = _count(states)

  def kernel(owner, x, gates, states, y):
    mine = owner[pl.program_id(0), pl.program_id(1)]

    @pl.when(mine < count)
    def _():
      out = function(x[...], jax.tree.map(lambda w: w[...], states))
      gate = column(gates[0], out.shape[-1])
      y[...] = jnp.where(gate == 0, 0.0, gate * out).astype(y.dtype)

    @pl.when(mine >= count)
    def _():
      y[...] = jnp.zeros_like(y)

  call = pl.pallas_call(
    kernel,
    out_shape=y,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=x.shape[:2],
      in_specs=[_tokens(x), _tokens(gates), jax.tree.map(_owned, states)],
      out_specs=_tokens(y),
    ),
    cost_estimate=_cost(function, expected, x, states, (x, gates, y), states),
    **_parameters(f"{name}_fwd", interpret),
  )
  return sequential_vmap(call)(owner, x, gates, states)


def _forward(function, expected, name, interpret, x, gates, owner, states):
  return _grouped(function, expected, name, interpret, x, gates, owner, states), (x, gates, owner, states)


def _backward(function, expected, name, interpret, residuals, d_y):
  x, gates, owner, states = residuals
  count = _count(states)

  def kernel(owner, x, gates, states, d_y, d_x, d_gates, d_states):
    row, block = pl.program_id(0), pl.program_id(1)
    mine, before = owner[row, block], owner[row, jnp.maximum(block - 1, 0)]

    @pl.when((block == 0) | (jnp.minimum(mine, count - 1) != jnp.minimum(before, count - 1)))
    def _():
      jax.tree.map(lambda d: d.__setitem__(..., jnp.zeros_like(d)), d_states)

    @pl.when(mine < count)
    def _():
      y, pull = jax.vjp(function, x[...], jax.tree.map(lambda w: w[...], states))
      gate, cotangent = column(gates[0], y.shape[-1]), d_y[...].astype(y.dtype)
      # A transposition and a sum over sublanes, to have a row of them.
      d_gates[0] = jnp.where(gate == 0, 0.0, y[0] * cotangent[0]).T.sum(0, keepdims=True)
      d_x[...], parts = pull(jnp.where(gate == 0, 0.0, gate * cotangent).astype(y.dtype))
      jax.tree.map(lambda d, part: d.__setitem__(..., d[...] + part.astype(d.dtype)), d_states, parts)

    @pl.when(mine >= count)
    def _():
      d_x[...] = jnp.zeros_like(d_x)
      d_gates[...] = jnp.zeros_like(d_gates)

  def back(x, states):
    y, pull = jax.vjp(function, x, states)
    return y, pull(y)

  # Gradients add up in float32.
  wide = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.promote_types(w.dtype, jnp.float32)), states)
  call = pl.pallas_call(
    kernel,
    out_shape=(x, gates, wide),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=x.shape[:2],
      in_specs=[_tokens(x), _tokens(gates), jax.tree.map(_owned, states), _tokens(d_y)],
      out_specs=(_tokens(x), _tokens(gates), jax.tree.map(_owned, wide)),
    ),
    cost_estimate=_cost(back, expected, x, states, (x, gates, d_y, x, gates), (states, wide)),
    **_parameters(f"{name}_bwd", interpret),
  )
  d_x, d_gates, d_states = sequential_vmap(call)(owner, x, gates, states, d_y)
  return d_x, d_gates, None, jax.tree.map(lambda d, w: d.astype(w.dtype), d_states, states)


_grouped.defvjp(_forward, _backward)


def _count(states: Pytree) -> int:
  return jax.tree.leaves(states)[0].shape[0]


def _one(x: jax.Array, states: Pytree) -> tuple[jax.ShapeDtypeStruct, Pytree]:
  """A block of tokens and a state, as the function gets them."""
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[2:]), a.dtype), (x, states))


def _tokens(x: jax.Array) -> pl.BlockSpec:
  return pl.BlockSpec((1, None, *x.shape[2:]), lambda row, block, owner: (row, block, 0, 0))


def _owned(w: jax.Array) -> pl.BlockSpec:
  """A block's own state; for an empty one the last, which the block before it may have had already."""
  return pl.BlockSpec(
    (None, 1, *w.shape[2:]), lambda row, block, owner: (jnp.minimum(owner[row, block], len(w) - 1), row, 0, 0)
  )


def _cost(function: Callable, blocks: int, x: jax.Array, states: Pytree, *arrays: Pytree) -> pl.CostEstimate:
  """So many full blocks of each row, all the states; every array crosses HBM once, empty blocks too."""
  blocks, work = x.shape[0] * blocks, cost.work(function, *_one(x, states))
  return pl.CostEstimate(
    flops=blocks * work.flops,
    transcendentals=blocks * work.transcendentals,
    bytes_accessed=sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(arrays)),
  )


def _parameters(name: str, interpret: bool | pltpu.InterpretParams) -> dict[str, Any]:
  return dict(
    name=name,
    interpret=interpret,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem.budget()),
  )
