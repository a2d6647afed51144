"""A sample is what the full forward passes say, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mc_jax.training import sampling, state


@pytest.fixture(scope="module")
def model(tiny, alone):
  config = tiny(pattern="attention")
  return state.graph(config), state.create(config, alone).params


def test_the_likeliest_tokens_follow_from_the_last_window(model, alone):
  graph, params = model
  logits = jax.jit(lambda tokens: nnx.merge(graph, params)(tokens)[0, -1])
  prompt = np.array([72, 101, 108])
  tokens = list(prompt)
  for _ in range(6):
    tokens.append(int(logits(jnp.array([tokens[-4:]])).argmax()))
  generated = sampling.sample(graph, params, prompt, alone, length=6, window=4, temperature=0, seed=0)
  np.testing.assert_array_equal(generated, tokens[3:])


def test_draws_depend_on_the_seed(model, alone):
  prompt = np.array([65])
  first, again, other = (
    sampling.sample(*model, prompt, alone, length=8, window=8, temperature=1.0, seed=seed) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()
