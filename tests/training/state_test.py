"""The state is a pytree of arrays that depends on the seed alone."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from mc_jax.training import state


def test_the_same_seed_gives_the_same_state_and_another_another(tiny, alone):
  first, second = state.create(tiny(), alone), state.create(tiny(), alone)
  chex.assert_trees_all_equal(first, second)
  train = dataclasses.replace(tiny().train, seed=1)
  other = state.create(dataclasses.replace(tiny(), train=train), alone)
  assert (first.params["embedding"] != other.params["embedding"]).any()
  assert int(first.step) == 0


def test_the_abstract_state_has_the_shapes_of_the_real_one(tiny, alone):
  real, abstract = state.create(tiny(), alone), state.abstract(tiny(), alone)
  chex.assert_trees_all_equal_shapes_and_dtypes(real, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract))
  assert state.parameter_count(real) == state.parameter_count(abstract) > 256 * 16
