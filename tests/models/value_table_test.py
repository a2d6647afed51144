"""Weighted sums of rows, and their gradients, against products with one-hot matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from quick_compile import jit

from mc_jax.models import value_table


def dense(values, rows, weights):
  one_hot = jax.nn.one_hot(rows, len(values), dtype=weights.dtype)
  return jnp.einsum("...hk,...hkn,nd->...d", weights, one_hot, values)


def drawn(count, width, lead, heads, k, seed=0):
  rng = np.random.default_rng(seed)
  rows = rng.integers(0, count, (*lead, heads, k)).astype(np.int32)
  return rng.normal(size=(count, width)), rows, rng.normal(size=rows.shape), rng.normal(size=(*lead, width))


@pytest.mark.parametrize(
  ("count", "width", "lead", "heads", "k"),
  [
    (50, 6, (3, 5), 2, 4),
    (3, 4, (150,), 2, 4),  # rows that many tokens read
    (1000, 8, (2, 1, 2), 1, 1),
    slow(1, 2, (9,), 1, 3),  # one row for all
    (40, 3, (), 2, 80),  # one token, more hits than one loop takes
  ],
)
def test_sums_and_gradients_are_those_of_one_hot_products(float64, count, width, lead, heads, k):
  values, rows, weights, cotangent = drawn(count, width, lead, heads, k)

  def both(read):
    y, back = jax.vjp(lambda values, weights: read(values, rows, weights), values, weights)
    return y, *back(cotangent)

  for got, expected in zip(jit(both, static_argnums=0)(value_table.read), both(dense), strict=True):
    np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("count", [slow(4), 30, slow(500)])
def test_gradients_of_rows_that_were_read(float64, count):
  values, rows, weights, cotangent = drawn(count, 5, (12,), 2, 3)
  distinct, gradients = value_table.row_gradients(rows, weights, cotangent, count)
  read = np.unique(rows)
  assert len(distinct) == len(gradients) == min(rows.size, count)
  np.testing.assert_array_equal(distinct[: len(read)], read)
  np.testing.assert_array_equal(distinct[len(read) :], count)
  np.testing.assert_array_equal(gradients[len(read) :], 0)
  (expected,) = jax.vjp(lambda values: dense(values, rows, weights), values)[1](cotangent)
  np.testing.assert_allclose(gradients[: len(read)], expected[read], atol=1e-13)


def test_bfloat16_tables_are_summed_in_float32():
  """Values are exact in float32; the sum of 64 terms is off by 64 roundings of 2^-24, and rounded once at the end."""
  values, rows, weights, cotangent = drawn(30, 16, (20,), 2, 32)
  table = jnp.asarray(values, jnp.bfloat16)
  weights, cotangent = jnp.float32(weights), jnp.asarray(cotangent, jnp.bfloat16)
  y, back = jax.vjp(lambda table, weights: value_table.read(table, rows, weights), table, weights)
  in_values, in_weights = back(cotangent)
  assert y.dtype == in_values.dtype == jnp.bfloat16 and in_weights.dtype == jnp.float32
  exact = (np.asarray(x, np.float64) for x in (table, weights, cotangent))
  values, weights, cotangent = exact
  terms = np.abs(weights[..., None] * values[rows]).sum((1, 2))
  np.testing.assert_array_less(np.abs(y - dense(values, rows, weights)), 2.0**-8 * np.abs(y) + 64 * 2.0**-24 * terms)
  expected = np.einsum("td,thkd->thk", cotangent, values[rows])
  np.testing.assert_allclose(in_weights, expected, atol=16 * 2.0**-24 * 16 * 9)
  by_row, sizes = np.zeros_like(values), np.zeros_like(values)
  np.add.at(by_row, rows, weights[..., None] * cotangent[:, None, None])
  np.add.at(sizes, rows, np.abs(weights[..., None] * cotangent[:, None, None]))
  np.testing.assert_array_less(np.abs(in_values - by_row), 2.0**-8 * np.abs(by_row) + 64 * 2.0**-24 * sizes + 1e-30)


def test_many_hits_on_one_row_are_added_up_better_than_one_by_one():
  rng = np.random.default_rng(0)
  rows = np.where(rng.random((50_000, 1, 2)) < 0.99, 3, rng.integers(0, 10, (50_000, 1, 2))).astype(np.int32)
  weights, cotangent = np.float32(rng.random(rows.shape)), np.float32(1 + rng.normal(size=(50_000, 4)))
  exact = np.zeros((10, 4))
  np.add.at(exact, rows, weights[..., None].astype(np.float64) * cotangent[:, None, None])
  (ours,) = jit(lambda values: jax.vjp(lambda v: value_table.read(v, rows, weights), values)[1](cotangent))(
    jnp.zeros((10, 4))
  )
  one_by_one = jnp.zeros((10, 4)).at[rows].add(weights[..., None] * cotangent[:, None, None])
  error, plain = (np.abs(x - exact).max() / np.abs(exact).max() for x in (ours, one_by_one))
  assert (rows == 3).sum() > 9e4
  # ceil(log8(1e5)) = 6 sums of 8 terms, and a product: 49 roundings of 2^-24.
  assert error < 49 * 2.0**-24 and error < plain / 4


def test_rows_beyond_the_table_are_the_last():
  values, rows, weights, _ = drawn(10, 4, (3,), 1, 2)
  read = functools.partial(value_table.read, jnp.float32(values), weights=jnp.float32(weights))
  np.testing.assert_array_equal(read(rows=rows + 10), read(rows=np.full_like(rows, 9)))
  np.testing.assert_array_equal(read(rows=rows - 10), read(rows=np.zeros_like(rows)))


@pytest.mark.parametrize(
  ("shapes", "dtype", "words"),
  [
    (((9, 4, 1), (3, 1, 2), (3, 1, 2)), jnp.int32, r"values \[N, value_dim\]"),
    (((9, 4), (3, 1, 2), (3, 2, 1)), jnp.int32, "of one shape"),
    (((9, 4), (3,), (3,)), jnp.int32, "of one shape"),
    (((9, 4), (3, 1, 2), (3, 1, 2)), jnp.float32, "rows must be integers"),
  ],
)
def test_bad_shapes_are_refused(shapes, dtype, words):
  values, rows, weights = (jnp.zeros(shape) for shape in shapes)
  with pytest.raises(ValueError, match=words):
    value_table.read(values, rows.astype(dtype), weights)
