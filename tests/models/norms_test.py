"""Norms: against their formulas, in float32 inside, and finite where vectors vanish."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mc_jax.models.norms import RMSNorm, l2_normalize


def test_rms_norm_of_each_head_with_its_own_scale():
  norm = RMSNorm({"heads": 2, "head_dim": 8}, rngs=nnx.Rngs(0))
  chex.assert_shape(norm.scale[...], (2, 8))
  x = jax.random.normal(jax.random.key(0), (3, 5, 2, 8)) * 7
  chex.assert_trees_all_close(jnp.square(norm(x)).mean(-1), jnp.ones((3, 5, 2)), rtol=1e-5)
  norm.scale[...] = jnp.array([[1.0], [3.0]]) * jnp.ones((2, 8))
  chex.assert_trees_all_close(jnp.square(norm(x)).mean(-1)[..., 1], jnp.full((3, 5), 9.0), rtol=1e-5)


def test_rms_norm_is_computed_in_float32():
  """300^2 * 1024 summed in bfloat16 would lose two digits; the output is bfloat16 all the same."""
  norm = RMSNorm({"embed": 1024}, rngs=nnx.Rngs(0))
  x = 300 + jax.random.normal(jax.random.key(0), (4, 1024))
  y = norm(x.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  expected = np.asarray(x.astype(jnp.bfloat16), np.float64)
  expected /= np.sqrt((expected**2).mean(-1, keepdims=True))
  chex.assert_trees_all_close(np.asarray(y, np.float64), expected, rtol=2**-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_l2_normalize(dtype):
  x = 5 * jax.random.normal(jax.random.key(0), (6, 32)).astype(dtype)
  y = l2_normalize(x)
  assert y.dtype == dtype
  chex.assert_trees_all_close(jnp.linalg.norm(y.astype(jnp.float32), axis=-1), jnp.ones(6), rtol=1e-2)


def test_a_zero_vector_stays_zero_with_a_finite_gradient():
  zero = jnp.zeros((2, 8))
  y, gradient = jax.value_and_grad(lambda x: l2_normalize(x).sum())(zero)
  assert y == 0
  chex.assert_tree_all_finite(gradient)
  norm = RMSNorm({"embed": 8}, rngs=nnx.Rngs(0))
  y, gradient = jax.value_and_grad(lambda x: norm(x).sum())(zero)
  assert y == 0
  chex.assert_tree_all_finite(gradient)
