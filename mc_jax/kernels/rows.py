"""Rows of a table that stays in HBM, a few dozen for each token: Pallas TPU kernels that sum or compare them.

A token's rows are fetched one by one into one of two buffers in VMEM, the next token's while this one's are used, so
that what is moved is the rows and no more. XLA's gather would write them to HBM side by side, and read them again.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES, _TOKENS = 128, 8  # tokens of a grid step: a tile of sublanes
_UNROLLED = 16  # copies that are started in a loop's turn


def unsupported(values: jax.Array, rows: jax.Array) -> str | None:
  """What the kernels cannot take, for a message; None if they take it all. rows [tokens, hits]."""
  if values.dtype != jnp.float32:
    return f"tables of {values.dtype} (float32 is: a row of a narrower dtype shares its words with another)"
  if values.shape[1] % _LANES:
    return f"values of {values.shape[1]} channels (a multiple of {_LANES} is)"
  if not rows.size:
    return "no rows"
  return None


def weighted_sum(
  values: jax.Array, rows: jax.Array, weights: jax.Array, *, interpret: bool | pltpu.InterpretParams = False
) -> jax.Array:
  """sum_j weights[t, j] values[rows[t, j]].

  Args:
    values: [N, width] float32, width a multiple of 128.
    rows: [tokens, hits] int32 in [0, N).
    weights: [tokens, hits].
    interpret: as in `pl.pallas_call`.

  Returns:
    [tokens, width] float32.
  """

  def add_up(weights, read):  # [1, hits], [hits, width]
    return jnp.dot(weights, read, precision=lax.Precision.HIGHEST)

  rows, weights = _whole_turns(rows), _whole_turns(weights.astype(jnp.float32))
  return _each_token(add_up, "rows_sum_fwd", values, rows, weights, values.shape[1], interpret)


def scores(
  values: jax.Array, rows: jax.Array, cotangent: jax.Array, *, interpret: bool | pltpu.InterpretParams = False
) -> jax.Array:
  """<cotangent[t], values[rows[t, j]]>: the gradient of `weighted_sum` in its weights, [tokens, hits] float32.

  Args:
    values, rows, interpret: as in `weighted_sum`.
    cotangent: [tokens, width].
  """

  def compare(cotangent, read):  # [1, width], [hits, width]
    return lax.dot_general(cotangent, read, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)

  hits, rows = rows.shape[1], _whole_turns(rows)
  cotangent = cotangent.astype(jnp.float32)
  return _each_token(compare, "rows_scores_bwd", values, rows, cotangent, rows.shape[1], interpret)[:, :hits]


def _whole_turns(x: jax.Array) -> jax.Array:
  """[tokens, hits] with hits in whole turns of the loop: those that are added are of row 0 and weigh nothing."""
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _UNROLLED)))


def _each_token(
  function: Callable[[jax.Array, jax.Array], jax.Array],
  name: str,
  values: jax.Array,
  rows: jax.Array,
  x: jax.Array,
  out: int,
  interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
  """function(x [1, in], its rows [hits, width]) to [1, out], token by token: x [tokens, in] to [tokens, out]."""
  (tokens, hits), width = rows.shape, values.shape[1]
  padding = -tokens % _TOKENS
  rows, x = (jnp.pad(each, ((0, padding), (0, 0))) for each in (rows, x))

  def kernel(rows, values, x, y, read, arrived):
    def fetch(token):
      slot = token % 2

      def turn(i, _):
        for j in range(_UNROLLED):
          hit = i * _UNROLLED + j
          row = values.at[pl.ds(rows[token, hit], 1)]
          pltpu.make_async_copy(row, read.at[slot, pl.ds(hit, 1)], arrived.at[slot]).start()
        return 0

      lax.fori_loop(0, hits // _UNROLLED, turn, 0)

    fetch(0)
    for token in range(_TOKENS):
      if token + 1 < _TOKENS:
        fetch(token + 1)
      slot = token % 2
      # A copy of the buffer's size that is not started: it waits for as many bytes.
      pltpu.make_async_copy(read.at[slot], read.at[slot], arrived.at[slot]).wait()
      y[pl.ds(token, 1), :] = function(x[pl.ds(token, 1), :], read[slot])

  def block(columns, **kwargs):
    return pl.BlockSpec((_TOKENS, columns), lambda i: (i, 0), **kwargs)

  padded = tokens + padding
  y = pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((padded, out), jnp.float32),
    grid=(padded // _TOKENS,),
    in_specs=[block(hits, memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY), block(x.shape[1])],
    out_specs=block(out),
    scratch_shapes=[pltpu.VMEM((2, hits, width), jnp.float32), pltpu.SemaphoreType.DMA((2,))],
    cost_estimate=pl.CostEstimate(
      flops=2 * padded * hits * width,
      transcendentals=0,
      bytes_accessed=4 * padded * (hits * width + hits + x.shape[1] + out),
    ),
    # Rows are in the table, as callers promise: a check of each copy would take as long as starting it.
    compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
    interpret=interpret,
    name=name,
  )(rows, values, x)
  return y[:tokens]
