"""Matrix products are counted through every transformation."""

import jax
import jax.numpy as jnp

from mc_jax.training import flops

A, B = jnp.zeros((3, 5)), jnp.zeros((5, 7))


def test_products_batched_or_not():
  assert flops.count(jnp.matmul, A, B) == 2 * 3 * 5 * 7
  batched = jax.ShapeDtypeStruct((4, 3, 5), jnp.float32)
  assert flops.count(lambda a: jnp.einsum("bij,jk->bik", a, B), batched) == 2 * 4 * 3 * 5 * 7
  assert flops.count(lambda a: jnp.sin(a) + a, A) == 0


def test_loops_count_as_often_as_they_turn():
  def loop(x):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ jnp.eye(5)), None), x, length=6)[0]

  assert flops.count(jax.jit(loop), A) == 6 * 2 * 3 * 5 * 5


def test_the_dearest_branch_counts():
  def branch(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ B @ B.T, lambda x: x, x)

  assert flops.count(branch, A) == 2 * (2 * 3 * 5 * 7)


def test_backward_costs_twice_forward():
  def loss(a, b):
    return jnp.sum(a @ b)

  forward = flops.count(loss, A, B)
  assert flops.count(jax.grad(loss, argnums=(0, 1)), A, B) in (2 * forward, 3 * forward)


def test_ragged_products():
  rows, weights = jnp.zeros((6, 5)), jnp.zeros((2, 5, 7))
  sizes = jnp.array([4, 2])
  assert flops.count(jax.lax.ragged_dot, rows, weights, sizes) == 2 * 6 * 5 * 7
