"""What a memory stores in a segment with its gates as they start; the solve by which its chunks do not overshoot."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples
from marks import slow

from mc_jax.bench import stored_pairs
from mc_jax.memory import arithmetic, networks, rules, segments

SIZES = [sizes if sizes == (32, 64, 64) else slow(*sizes) for sizes in stored_pairs.SIZES]


@pytest.mark.parametrize(("head_dim", "chunk", "segment"), SIZES)
def test_a_fresh_titans_writes_its_pairs(head_dim, chunk, segment):
  rule = rules.get("titans", chunk=chunk)
  share, left = stored_pairs.written(rule, segment, *stored_pairs.pairs(head_dim, segment))
  assert 0.2 < share < 1.3
  assert left < 0.95
  _, left = stored_pairs.written(rule, segment, *stored_pairs.pairs(head_dim, segment, repeated=True))
  assert left < 1.3


@pytest.mark.parametrize(("head_dim", "chunk", "segment"), SIZES)
def test_a_fresh_dla_writes_its_pairs(head_dim, chunk, segment):
  share, _ = stored_pairs.written(rules.get("dla", chunk=chunk), segment, *stored_pairs.pairs(head_dim, segment))
  assert 0.2 < share < 1.3


def test_frozen_errors_of_the_same_size_overshoot():
  """What the solve is for: without it the same steps leave many times the error."""
  rule = rules.get("titans", chunk=64)
  frozen = rules.get("titans", chunk=64, solve=False, max_step=rule.gate_init(64)["eta"].maximum)
  _, left = stored_pairs.written(frozen, 64, *stored_pairs.pairs(32, 64))
  assert left > 2


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_matrix_that_solves_is_the_delta_rule_at_every_chunk_length(float64, chunk):
  """W_t = a W_{t-1} + S_t, S_t = b S_{t-1} - (1 - b) eta k (x) (k W_{t-1} - v) / |k|^2, token by token."""
  options = dict(retention=True, momentum=True, normalized=True, solve=True, learned_init=False)
  rule = rules.GradientRule("delta", networks.Matrix(), rules.squared_loss, chunk=chunk, **options)
  x = samples.inputs(rule, batch=1, length=17, heads=1)
  gates = x.gates | {"eta": 6 * x.gates["eta"]}
  q, k, v = (w[0, :, 0] for w in (x.q, 2 * x.k, x.v))
  a, b, eta = (gates[name][0, :, 0] for name in ("alpha", "beta", "eta"))
  w, s, expected = x.init["w"][0], 0.0, []
  for t in range(17):
    s = b[t] * s - (1 - b[t]) * eta[t] * np.outer(k[t], k[t] @ w - v[t]) / (k[t] @ k[t])
    w = a[t] * w + s
    expected.append(q[t] @ w)
  y = samples.forward(rule=rule, aggregation="none", segmentation=segments.constant(17))(
    x._replace(k=2 * x.k, gates=gates)
  )
  np.testing.assert_allclose(y[0, :, 0], expected, rtol=1e-5, atol=1e-5)  # steps are divided by |k|^2 and a millionth


def lower(length, dtype, repeated):
  """N of the delta rule with eta = 1.5: strictly lower triangular, of random unit keys or of one key."""
  k = stored_pairs.unit(np.random.default_rng(1).normal(size=(2, length, 16)))
  k = np.repeat(k[:, :1], length, 1) if repeated else k
  return np.tril(1.5 * k @ np.swapaxes(k, -1, -2), -1).astype(dtype)


@pytest.mark.parametrize("solve", [arithmetic.solve, arithmetic.solve_in_kernel])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("length", [1, slow(2), 7, slow(64), 65, slow(200)])
def test_the_solve_and_its_gradient_are_those_of_the_triangular_system(float64, length, repeated, solve):
  n, r = lower(length, np.float64, repeated), np.random.default_rng(2).normal(size=(2, length, 5))

  def dense(n, r):
    return jnp.linalg.solve(jnp.eye(length) + jnp.tril(n, -1), r)

  def run(by):
    return lambda n, r: jax.vjp(by, n, r)

  x, pull = jax.jit(run(solve))(n, r)
  expected, pull_expected = jax.jit(run(dense))(n, r)
  np.testing.assert_allclose(x, expected, rtol=1e-9, atol=1e-9)
  (gn, gr), (en, er) = pull(np.ones_like(r)), pull_expected(np.ones_like(r))
  chex.assert_trees_all_close((jnp.tril(gn, -1), gr), (en, er), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solve", [arithmetic.solve, arithmetic.solve_in_kernel])
@pytest.mark.parametrize("repeated", [slow(False), True])
def test_the_solve_in_float32_leaves_an_error_of_a_thousandth_at_most(repeated, solve):
  n, r = lower(256, np.float32, repeated), np.random.default_rng(2).normal(size=(2, 256, 5)).astype(np.float32)
  expected = np.linalg.solve(np.eye(256) + n.astype(np.float64), r)
  np.testing.assert_allclose(jax.jit(solve)(n, r), expected, atol=1e-3 * np.abs(expected).max())
