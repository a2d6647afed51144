"""The causal convolution against NumPy's, document by document."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mc_jax.models.convolution import CausalConvolution
from mc_jax.models.language_model import number_documents

CHANNELS = {"heads": 2, "head_dim": 3}


def _convolve(x, kernel):
  """np.convolve of one document, x [length, heads, head_dim], kernel [width, heads, head_dim]."""
  return np.stack(
    [[np.convolve(x[:, h, d], kernel[:, h, d])[: len(x)] for d in range(x.shape[2])] for h in range(x.shape[1])]
  ).transpose(2, 0, 1)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_one_document_is_numpys_convolution(width):
  convolution = CausalConvolution(CHANNELS, width, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (2, 9, 2, 3))
  expected = np.stack([_convolve(np.asarray(row), np.asarray(convolution.kernel[...])) for row in x])
  chex.assert_trees_all_close(convolution(x), expected, atol=1e-6)


def test_a_row_shorter_than_the_window():
  convolution = CausalConvolution(CHANNELS, 4, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (1, 2, 2, 3))
  expected = _convolve(np.asarray(x[0]), np.asarray(convolution.kernel[...]))
  chex.assert_trees_all_close(convolution(x)[0], expected, atol=1e-6)


@pytest.mark.parametrize(
  "segment_ids",
  [
    [1, 1, 1, 1, 2, 2, 2, 2, 2, 3],
    [1, 2, 3, 3, 3, 3, 4, 4, 0, 0],
    [0, 0, 5, 5, 0, 5, 5, 5, 2, 2],  # a document is a maximal run: 5 is two of them
  ],
)
def test_packed_documents_are_convolved_each_alone(segment_ids):
  convolution = CausalConvolution(CHANNELS, 4, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (1, 10, 2, 3))
  y = convolution(x, number_documents(jnp.array([segment_ids])))
  edges = np.flatnonzero(np.diff(segment_ids, prepend=-1, append=-1))
  for start, stop in itertools.pairwise(edges):
    if segment_ids[start]:
      expected = _convolve(np.asarray(x[0, start:stop]), np.asarray(convolution.kernel[...]))
      chex.assert_trees_all_close(y[0, start:stop], expected, atol=1e-6)


def test_nothing_leaks_between_documents_not_even_infinity():
  """A masked product must be a select: 0 * inf is NaN."""
  convolution = CausalConvolution(CHANNELS, 4, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (1, 8, 2, 3)).at[:, 3].set(jnp.inf)
  y = convolution(x, number_documents(jnp.array([[1, 1, 1, 1, 2, 2, 0, 0]])))
  chex.assert_tree_all_finite(y[:, 4:6])


def test_the_computation_has_the_inputs_dtype_and_the_kernel_is_float32():
  convolution = CausalConvolution(CHANNELS, 4, rngs=nnx.Rngs(0))
  assert convolution(jnp.ones((1, 5, 2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
  assert convolution.kernel[...].dtype == jnp.float32
