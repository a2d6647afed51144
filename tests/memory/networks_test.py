"""The memories' networks against their formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples

from mc_jax.memory import networks


def layer_norm(x):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_deep_memory_is_its_formula(depth, norm):
  """M(x) = x + gelu(... gelu(x W_1) ...) W_depth, the branch normalised or not."""
  network = networks.MLP(depth, 3, norm)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), 1, 4))
  weights = {name: rng.normal(size=w.shape[1:]).astype(np.float32) for name, w in shapes.items()}
  assert {name: w.shape for name, w in weights.items()} == {
    1: {"w1": (4, 4)},
    2: {"w1": (4, 12), "w2": (12, 4)},
    4: {"w1": (4, 12), "w2": (12, 12), "w3": (12, 12), "w4": (12, 4)},
  }[depth]
  x = rng.normal(size=(5, 4)).astype(np.float32)
  h = x
  for layer in range(1, depth):
    h = np.asarray(jax.nn.gelu(h @ weights[f"w{layer}"]))
  h = h @ weights[f"w{depth}"]
  y = samples.jit(lambda x: network(x, lambda name, z: z @ weights[name]))(x)
  chex.assert_trees_all_close(y, x + (layer_norm(h) if norm else h), rtol=1e-4, atol=1e-4)


def test_a_matrix_memory_is_a_matrix():
  w = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
  x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
  chex.assert_trees_all_equal(networks.Matrix()(x, lambda name, z: z @ {"w": w}[name]), x @ w)


def test_layer_norm_of_nothing_is_nothing_gradients_included():
  y, gradient = samples.jit(jax.value_and_grad(lambda x: networks.layer_norm(x).sum()))(jnp.zeros((3, 4)))
  chex.assert_tree_all_finite((y, gradient))
