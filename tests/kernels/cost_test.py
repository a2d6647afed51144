"""Work counted in a program: products by hand, what is free, and programs inside programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from mc_jax.kernels import cost

M, N, K = 3, 5, 7
A, B = jax.ShapeDtypeStruct((M, K), jnp.float32), jax.ShapeDtypeStruct((K, N), jnp.float32)


def test_a_product_is_two_flops_a_multiply_add():
  assert cost.work(jnp.matmul, A, B) == (2 * M * N * K, 0)
  many, one = jax.ShapeDtypeStruct((4, 2, M, K), jnp.bfloat16), jax.ShapeDtypeStruct((2, K, N), jnp.bfloat16)
  assert cost.work(jnp.matmul, many, one).flops == 4 * 2 * 2 * M * N * K
  assert cost.work(lambda x: jnp.einsum("mk,mk->", x, x), A).flops == 2 * M * K


def test_a_gradient_has_two_products_more():
  def both(a, b):
    y, pull = jax.vjp(lambda a, b: jnp.sin(a @ b), a, b)
    return y, pull(y)

  assert cost.work(both, A, B) == (3 * 2 * M * N * K, 2 * M * N)


def test_transcendentals_are_counted_one_an_element():
  assert cost.work(lambda x: jnp.exp(x) + jnp.tanh(x) * jax.lax.rsqrt(x) + jnp.abs(x), A) == (0, 3 * M * K)


def test_what_the_result_does_not_need_is_free():
  def function(a, b):
    unused = jnp.exp(a @ b)
    return a + 1, unused

  assert cost.work(lambda a, b: function(a, b)[0], A, B) == (0, 0)
  assert cost.work(lambda a, b: jax.jit(function)(a, b)[0], A, B) == (0, 0)
  assert cost.work(lambda a, b: jax.jit(function)(a, b)[1], A, B) == (2 * M * N * K, M * N)
  assert cost.work(lambda a, b: function(a, b), A, B) == (2 * M * N * K, M * N)


@jax.custom_vjp
def custom(a, b):
  return a @ b


custom.defvjp(lambda a, b: (a @ b, (a, b)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@pytest.mark.parametrize(
  "wrapped",
  [jax.jit(jnp.matmul), jax.checkpoint(jnp.matmul), custom, jax.jit(jax.jit(custom))],
  ids=["jit", "checkpoint", "custom_vjp", "nested"],
)
def test_programs_inside_are_walked(wrapped):
  assert cost.work(wrapped, A, B).flops == 2 * M * N * K


def test_loops_count_every_trip():
  square = jax.ShapeDtypeStruct((K, K), jnp.float32)

  def loop(x):
    return jax.lax.scan(lambda y, _: (jnp.tanh(y @ x), y), x, None, length=9)

  for output in (0, 1):  # what is carried is needed, whoever asks
    assert cost.work(lambda x, output=output: loop(x)[output], square) == (9 * 2 * K**3, 9 * K * K)


def test_a_while_counts_one_turn_whatever_it_carries():
  square = jax.ShapeDtypeStruct((K, K), jnp.float32)

  def loop(x, count):
    return jax.lax.fori_loop(0, count, lambda _, carry: (carry[1] + 1, carry[1] @ x), (x, x))[0]

  assert cost.work(loop, square, 3).flops == 2 * K**3


def test_the_dearest_branch_counts():
  def branch(x, y):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ y @ y.T, lambda x: x, x)

  assert cost.work(branch, A, B).flops == 2 * (2 * M * N * K)


def test_ragged_products():
  rows, weights = jax.ShapeDtypeStruct((6, K), jnp.float32), jax.ShapeDtypeStruct((2, K, N), jnp.float32)
  assert cost.work(jax.lax.ragged_dot, rows, weights, jnp.array([4, 2])).flops == 2 * 6 * K * N


@pytest.mark.parametrize(("estimate", "flops"), [(None, 4 * 2 * 8**3), (pl.CostEstimate(5, 0, 0), 5)])
def test_a_kernel_counts_its_estimate_or_its_grid(estimate, flops):
  def kernel(x, y):
    y[...] = x[...] @ x[...]

  block = pl.BlockSpec((8, 8), lambda i: (i, 0))
  like = jax.ShapeDtypeStruct((32, 8), jnp.float32)
  call = pl.pallas_call(
    kernel, grid=(4,), in_specs=[block], out_specs=block, out_shape=like, cost_estimate=estimate, interpret=True
  )
  assert cost.work(call, like).flops == flops
