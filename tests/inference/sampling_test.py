"""Draws: frequencies, and what may be drawn at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mc_jax.inference.sampling import Sampling, _truncate, draw

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32)
DRAWS = 4000


def frequencies(temperature=1.0, top_k=0, top_p=1.0):
  def full(value, dtype):
    return jnp.full(DRAWS, value, dtype)

  sampling = Sampling(full(temperature, "f"), full(top_k, "i"), full(top_p, "f"), jnp.arange(DRAWS, dtype=jnp.uint32))
  logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (DRAWS, 5))
  drawn = jax.jit(draw)(logits, sampling, full(3, "i"))
  return np.bincount(drawn, minlength=5) / DRAWS


def powered(kept, exponent=1.0):
  weights = np.where(kept, PROBABILITIES**exponent, 0)
  return weights / weights.sum()


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({}, powered([1, 1, 1, 1, 1])),
    ({"temperature": 0.5}, powered([1, 1, 1, 1, 1], 2)),
    ({"top_k": 2}, powered([0, 1, 0, 1, 0])),
    ({"top_p": 0.69}, powered([0, 1, 0, 1, 0])),
    ({"top_p": 0.71}, powered([0, 1, 0, 1, 1])),
    ({"top_p": 1e-6}, powered([0, 1, 0, 0, 0])),
    ({"top_k": 3, "top_p": 0.6}, powered([0, 1, 0, 1, 0])),
    ({"temperature": 0.0, "top_k": 3}, powered([0, 1, 0, 0, 0])),
  ],
)
def test_frequencies(options, expected):
  found = frequencies(**options)
  assert (found[expected == 0] == 0).all()
  np.testing.assert_allclose(found, expected, atol=4 * 0.5 / np.sqrt(DRAWS))


def test_rows_have_their_own_settings_and_draws_their_own_places():
  logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (3, 5))
  sampling = Sampling(jnp.array([0.0, 1.0, 1.0]), jnp.array([0, 1, 0]), jnp.ones(3), jnp.zeros(3, jnp.uint32))
  drawn = np.array([draw(logits, sampling, jnp.full(3, place)) for place in range(30)])
  assert (drawn[:, :2] == 1).all()
  assert len(set(drawn[:, 2])) > 2


def test_nothing_is_forbidden_beside_a_row_that_draws_from_few():
  """Likelier tokens' probabilities may add up to 1 in float32 before the last ones."""
  logits = jax.random.normal(jax.random.key(0), (2, 32_000)) * 3
  sampling = Sampling(jnp.ones(2), jnp.array([0, 1]), jnp.ones(2), jnp.zeros(2, jnp.uint32))
  allowed = _truncate(logits, sampling.top_k, sampling.top_p)
  assert (jnp.isfinite(allowed).sum(-1) == jnp.array([32_000, 1])).all()
