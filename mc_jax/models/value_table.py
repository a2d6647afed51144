"""Weighted sums of rows of a table too large to be multiplied: what memory layers read their values with.

Of N rows each token reads a few dozen. Its answer is one weighted sum, so that what is moved is the rows and no more:
on TPUs by the kernels of kernels/rows.py, elsewhere by XLA. The gradient is not the scatter-add that JAX would make of
a gather: hits are sorted by row, each row's are added up in float32, eight at a time, then their sums, and the row is
written once. That costs a sort, and gives the same numbers every time with an error that grows with the logarithm of a
row's hits.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mc_jax.kernels import rows as kernels
from mc_jax.memory.arithmetic import state_dtype

_RADIX = 8  # hits of a row, and then sums of hits, that are added up in one pass


def read(values: jax.Array, rows: jax.Array, weights: jax.Array) -> jax.Array:
  """sum over heads and k of weight * values[row]: one answer a token, the same table for all heads.

  Args:
    values: [N, value_dim], float32, bfloat16 or float64.
    rows: [..., heads, k] int32 in [0, N); others are taken for the nearest.
    weights: [..., heads, k], of rows.

  Returns:
    [..., value_dim] in the dtype of values. Products and sums are at least float32, also in the gradients.

  Raises:
    ValueError: Shapes that do not go together.
  """
  if values.ndim != 2 or rows.ndim < 2 or rows.shape != weights.shape:
    raise ValueError(
      "read needs values [N, value_dim] and rows and weights [..., heads, k] of one shape, got "
      f"{values.shape}, {rows.shape} and {weights.shape}"
    )
  if not jnp.issubdtype(rows.dtype, jnp.integer):
    raise ValueError(f"rows must be integers, got {rows.dtype}")
  *lead, heads, k = rows.shape
  values, weights = jnp.asarray(values), jnp.asarray(weights)
  rows = jnp.clip(rows.astype(jnp.int32), 0, len(values) - 1)
  y = _read(values, rows.reshape(-1, heads * k), weights.reshape(-1, heads * k))
  return y.reshape(*lead, values.shape[1])


def row_gradients(rows: jax.Array, weights: jax.Array, cotangent: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """The gradient of `read` in its values, of the rows that were read alone.

  Args:
    rows: [..., heads, k] int32 in [0, count).
    weights: [..., heads, k].
    cotangent: [..., value_dim], of the answers.
    count: N, rows of the table.

  Returns:
    The rows, [m] int32 ascending and each once, m = min(hits, count), those that are left over `count`; and their
    gradients [m, value_dim], at least float32, zero where left over.
  """
  rows, weights, cotangent = map(jnp.asarray, (rows, weights, cotangent))
  hits = rows.shape[-2] * rows.shape[-1]
  return _sums(rows.reshape(-1, hits), weights.reshape(-1, hits), cotangent.reshape(-1, cotangent.shape[-1]), count)


@jax.custom_vjp
def _read(values, rows, weights):
  """`read` of rows and weights [tokens, hits]."""
  if kernels.unsupported(values, rows) is None:
    return lax.platform_dependent(values, rows, weights, tpu=kernels.weighted_sum, default=_by_xla)
  return _by_xla(values, rows, weights)


def _forward(values, rows, weights):
  return _read(values, rows, weights), (values, rows, weights)


def _backward(residuals, cotangent):
  values, rows, weights = residuals
  cotangent = jnp.asarray(cotangent)
  if kernels.unsupported(values, rows) is None:
    in_weights = lax.platform_dependent(values, rows, cotangent, tpu=kernels.scores, default=_scores)
  else:
    in_weights = _scores(values, rows, cotangent)
  in_values = _spread(*_sums(rows, weights, cotangent, len(values)), len(values))
  return in_values.astype(values.dtype), None, in_weights.astype(weights.dtype)


_read.defvjp(_forward, _backward)


def _rows_of(table, rows):
  return table.at[rows].get(mode="promise_in_bounds").astype(state_dtype(table.dtype))


def _by_xla(values, rows, weights):
  # Row after row, unrolled: one loop over tokens, to which gathers are fused. Together they would be an array of
  # [tokens, hits, value_dim].
  total = jnp.zeros((len(rows), values.shape[1]), state_dtype(values.dtype))
  for j in range(rows.shape[1]):
    total += weights[:, j, None].astype(total.dtype) * _rows_of(values, rows[:, j])
    if j % 128 == 127:
      total = lax.optimization_barrier(total)
  return total.astype(values.dtype)


def _scores(values, rows, cotangent):
  """<cotangent, row> of every hit, [tokens, hits]: a few tokens at a time, whose rows fit a core's cache."""
  tokens, hits = rows.shape
  together = max(1, min(tokens, (1 << 19) // (hits * values.shape[1])))
  padding = -tokens % together

  def cut(x):
    return jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, together, x.shape[1])

  def step(_, xs):
    rows, cotangent = xs
    read = _rows_of(values, rows)
    return None, jnp.einsum("td,tkd->tk", cotangent.astype(read.dtype), read, precision=lax.Precision.HIGHEST)

  _, scores = lax.scan(step, None, (cut(rows), cut(cotangent)))
  return scores.reshape(-1, hits)[:tokens]


def _sums(rows, weights, cotangent, count):
  """`row_gradients` of rows and weights [tokens, hits]."""
  hits = rows.size
  if not hits:
    return jnp.zeros(0, jnp.int32), jnp.zeros((0, cotangent.shape[-1]), state_dtype(cotangent.dtype))
  ids, order = lax.sort((rows.reshape(-1), jnp.arange(hits, dtype=jnp.int32)), num_keys=1)
  weights, token = weights.reshape(-1)[order], order // rows.shape[1]
  dtype = state_dtype(cotangent.dtype)

  def hit(i):
    return weights[i, None].astype(dtype) * _rows_of(cotangent, token[i])

  # What is read up to eight times is added up now, up to 64 times in the next pass, ... What n terms of `count` rows
  # leave are n / 8 + count sums at most.
  ids, sums, left = _added(ids, count, hit, min(hits, hits // _RADIX + count))

  def again(carry):
    ids, sums, _ = carry
    return _added(ids, count, functools.partial(_rows_of, sums), len(ids))

  ids, sums, _ = lax.while_loop(lambda carry: carry[2], again, (ids, sums, left))
  size = min(hits, count)
  return ids[:size], sums[:size]


def _added(ids, count, term, size):
  """Terms of one row, which lie side by side, added up to _RADIX at a time.

  Args:
    ids: [terms] int32 ascending, the terms' rows; `count` where there is none.
    term: i [n] int32 to the terms at i, [n, value_dim].
    size: as many sums there can be.

  Returns:
    The sums' rows and the sums, `size` of each, and whether a row has several.
  """
  terms = len(ids)
  at = jnp.arange(terms, dtype=jnp.int32)
  first = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
  nth = at - lax.cummax(jnp.where(first, at, 0))
  leads = (nth % _RADIX == 0) & (ids < count)
  group = jnp.cumsum(leads, dtype=jnp.int32) - 1
  start = jnp.full(size, terms, jnp.int32).at[jnp.where(leads, group, size)].set(at, mode="drop")
  there = start < terms
  start = jnp.where(there, start, terms - 1)
  sums_ids = jnp.where(there, ids[start], count)
  total = 0.0
  for j in range(_RADIX):
    i = jnp.minimum(start + j, terms - 1)
    same = there & (start + j < terms) & (ids[i] == sums_ids) if j else there
    total += jnp.where(same[:, None], term(i), 0)
  return sums_ids, total, jnp.any((nth >= _RADIX) & (ids < count))


def _spread(distinct, sums, count):
  """Gradients of distinct rows as those of the table, [count, value_dim]: every row is written once."""
  where = jnp.full(count, -1, jnp.int32).at[distinct].set(jnp.arange(len(distinct), dtype=jnp.int32), mode="drop")
  if not len(distinct):
    return jnp.zeros((count, sums.shape[1]), sums.dtype)
  return jnp.where((where >= 0)[:, None], sums[jnp.maximum(where, 0)], 0)
