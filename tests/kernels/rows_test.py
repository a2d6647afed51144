"""Kernels that fetch rows of a table, against products with one-hot matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mc_jax.kernels import rows as kernels


@pytest.mark.parametrize(
  ("count", "width", "tokens", "hits"),
  [(50, 128, 8, 8), (17, 256, 11, 5), (9, 128, 1, 1), (300, 128, 19, 128)],
)
def test_kernels_are_products_with_one_hot_matrices(count, width, tokens, hits):
  rng = np.random.default_rng(tokens)
  values, cotangent = rng.normal(size=(count, width)), rng.normal(size=(tokens, width))
  rows, weights = rng.integers(0, count, (tokens, hits)), rng.normal(size=(tokens, hits))
  arrays = jnp.float32(values), jnp.int32(rows)
  interpret = pltpu.InterpretParams()
  y = kernels.weighted_sum(*arrays, jnp.float32(weights), interpret=interpret)
  np.testing.assert_allclose(y, np.einsum("tk,tkd->td", weights, values[rows]), rtol=1e-5, atol=1e-4)
  scores = kernels.scores(*arrays, jnp.float32(cotangent), interpret=interpret)
  np.testing.assert_allclose(scores, np.einsum("td,tkd->tk", cotangent, values[rows]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
  ("width", "dtype", "words"),
  [(64, jnp.float32, "64 channels"), (128, jnp.bfloat16, "bfloat16"), (128, jnp.float32, None)],
)
def test_what_is_not_supported_is_said(width, dtype, words):
  reason = kernels.unsupported(jax.ShapeDtypeStruct((9, width), dtype), jax.ShapeDtypeStruct((4, 2), jnp.int32))
  assert (reason is None) if words is None else (words in reason)
