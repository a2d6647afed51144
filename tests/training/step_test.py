"""A step is the mean loss, its gradient and one update, however the batch is divided."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marks import slow
from quick_compile import jit

from mc_jax.evaluation import scoring
from mc_jax.training import state, step


def _batch(seed, rows=4, length=16):
  random = np.random.default_rng(seed)
  return {
    "tokens": random.integers(0, 256, (rows, length)).astype(np.int32),
    "targets": random.integers(0, 256, (rows, length)).astype(np.int32),
    "weights": (random.random((rows, length)) < np.linspace(0.1, 1, rows)[:, None]).astype(np.float32),
  }


@pytest.fixture(scope="module")
def setting(tiny, alone):
  config = tiny(warmup_steps=0)
  return config, alone, state.create(config, alone)


def test_the_loss_is_the_mean_over_the_tokens_that_count(setting):
  config, mesh, start = setting
  graph, batch = state.graph(config), _batch(0)
  logits = jit(lambda params: nnx.merge(graph, params)(batch["tokens"]))(start.params)
  logits = np.asarray(logits, np.float64)
  log_sum = np.log(np.exp(logits).sum(-1))
  nll = log_sum - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
  expected = (nll * batch["weights"]).sum() / batch["weights"].sum()
  _, values = jit(step.train_step(config, mesh))(start, batch)
  assert float(values["loss"]) == pytest.approx(expected, rel=1e-5)
  score = scoring.scorer(graph, config.data, mesh)
  assert scoring.bits(score(start.params, [batch])) == pytest.approx(
    expected / np.log(2) * batch["weights"].sum(), rel=1e-5
  )


@pytest.mark.parametrize("parts", [slow(2), 4])
def test_accumulated_microbatches_equal_one_batch(setting, parts):
  """Their weights are uneven: a mean of the parts' means would differ."""
  config, mesh, start = setting
  accumulating = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=parts))
  whole, whole_values = jit(step.train_step(config, mesh))(start, _batch(0))
  divided, values = jit(step.train_step(accumulating, mesh))(start, _batch(0))
  chex.assert_trees_all_close(values, whole_values, rtol=1e-5)
  # Adam's first moment is a tenth of the clipped gradient: it compares gradients, not their signs.
  chex.assert_trees_all_close(divided.opt_state[1][0].mu, whole.opt_state[1][0].mu, atol=1e-7, rtol=1e-4)


def test_training_lowers_the_loss_on_a_batch(setting):
  config, mesh, current = setting
  update = jit(step.train_step(config, mesh))
  losses = []
  for _ in range(6):
    current, values = update(current, _batch(0))
    losses.append(float(values["loss"]))
  assert losses == sorted(losses, reverse=True)
  assert int(current.step) == 6


def test_rows_of_padding_are_finite(setting):
  config, mesh, start = setting
  batch = jax.tree.map(jnp.zeros_like, _batch(0))
  new, values = jit(step.train_step(config, mesh))(start, batch)
  assert float(values["loss"]) == 0.0
  chex.assert_tree_all_finite(new.params)
