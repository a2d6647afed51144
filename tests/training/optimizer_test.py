"""The schedule's landmarks, and which weights decay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mc_jax.training import optimizer, state
from mc_jax.training.optimizer import OptimizerConfig, ValuesConfig


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_linear_warmup_then_a_cosine_to_the_final_fraction(warmup):
  config = OptimizerConfig(learning_rate=0.5, warmup_steps=warmup, final_fraction=0.2)
  rate = np.array([optimizer.schedule(config, 50)(step) for step in range(51)])
  np.testing.assert_allclose(rate[:warmup], 0.5 * np.arange(1, warmup + 1) / max(warmup, 1), rtol=1e-6)
  assert rate[warmup] == pytest.approx(0.5)
  assert rate[50] == pytest.approx(0.1)
  assert (np.diff(rate[warmup:]) < 0).all()
  middle = warmup + (50 - warmup) // 2
  if (50 - warmup) % 2 == 0:
    assert rate[middle] == pytest.approx(0.3)


def test_a_run_shorter_than_its_warmup_only_warms_up():
  rate = optimizer.schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10), 5)
  np.testing.assert_allclose([rate(step) for step in range(5)], np.arange(1, 6) / 10, rtol=1e-6)


def test_the_rate_stays_where_the_cosine_ended():
  config = OptimizerConfig(learning_rate=0.5, warmup_steps=2, final_fraction=0.2, decay_steps=10)
  rate = [optimizer.schedule(config, 50)(step) for step in range(50)]
  np.testing.assert_allclose(rate[10:], 0.1, rtol=1e-6)
  short = [optimizer.schedule(dataclasses.replace(config, decay_steps=0), 10)(step) for step in range(10)]
  np.testing.assert_allclose(rate[:10], short, rtol=1e-6)


def test_a_finished_cosine_that_is_made_longer_is_reported_with_the_flag_that_keeps_it_finished():
  config = OptimizerConfig(learning_rate=1.0, warmup_steps=2, final_fraction=0.1)
  rate = float(optimizer.schedule(config, 20)(10))
  line, flag = optimizer.schedule_changes(config, 10, config, 20, done=10)
  assert f"the learning rate of step 11 is {rate:.3g}; in the earlier schedule it was 0.1" in line
  assert "ended at step 10 and now ends at step 20" in line
  assert flag.endswith("--config.optimizer.decay_steps=10")
  assert optimizer.schedule_changes(config, 20, config, 10, done=10) == []  # no step is left
  kept = dataclasses.replace(config, decay_steps=10)
  assert optimizer.schedule_changes(config, 10, kept, 20, done=10) == []


def test_other_changes_of_the_schedule_are_reported_if_they_change_the_next_rate():
  config = OptimizerConfig(learning_rate=1.0, warmup_steps=2)
  higher = dataclasses.replace(config, learning_rate=2.0)
  (line,) = optimizer.schedule_changes(config, 10, higher, 10, done=5)
  assert "cosine" not in line
  (line,) = optimizer.schedule_changes(config, 10, config, 20, done=5)  # its decay is not finished yet
  assert "now ends at step 20" in line
  assert optimizer.schedule_changes(config, 10, dataclasses.replace(config, beta2=0.9), 10, done=5) == []


@pytest.mark.parametrize("mixer", ["memory", "attention"])
def test_weight_decay_is_for_the_kernels_of_projections(tiny, mixer):
  config = tiny(pattern=mixer)
  params = state.abstract(config, config.make_mesh(jax.devices()[:1])).params
  decays = {
    jax.tree_util.keystr(path, simple=True, separator="."): flag
    for path, flag in jax.tree_util.tree_leaves_with_path(optimizer.decayed(params))
  }
  for name, flag in decays.items():
    spared = any(part in name for part in ("norm", "embedding", "bias", "convolution", "token_gates", "initial"))
    assert flag != spared, name
  assert decays[f"blocks.mixer.{'query' if mixer == 'attention' else 'projection'}.kernel"]
  assert not decays["embedding"]


def test_without_gradients_only_weight_decay_moves_weights():
  params = {"a": {"kernel": jnp.full((2, 3), 2.0)}, "norm": {"scale": jnp.full((3,), 2.0)}}
  config = OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.1)
  update = optimizer.adamw(config, 10)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = update.update(zeros, update.init(params), params)
  np.testing.assert_allclose(updates["a"]["kernel"], -0.5 * 0.1 * 2.0, rtol=1e-6)
  np.testing.assert_array_equal(updates["norm"]["scale"], 0)


def test_gradients_are_clipped_to_the_global_norm():
  """Clipped and then scaled: with epsilon far above the gradients, AdamW is linear in them."""
  params = {"a": jnp.zeros(4), "b": jnp.zeros(4)}
  grads = {"a": jnp.full(4, 3.0), "b": jnp.full(4, -1.0)}

  def first_update(clip_norm, grads):
    config = OptimizerConfig(warmup_steps=0, epsilon=1e6, clip_norm=clip_norm)
    update = optimizer.adamw(config, 10)
    return update.update(grads, update.init(params), params)[0]

  norm = optax.tree.norm(grads)
  scaled = jax.tree.map(lambda g: g * 0.5 / norm, grads)
  for name, update in first_update(0.5, grads).items():
    np.testing.assert_allclose(update, first_update(0.0, scaled)[name], rtol=1e-4)
    np.testing.assert_allclose(first_update(100.0, grads)[name], first_update(0.0, grads)[name], rtol=1e-6)


PARAMS = {"blocks": {"kernel": jnp.full((2, 3), 2.0)}, "shared": {"product_keys": {"values": jnp.full((4, 3), 2.0)}}}


def stepped(grads, steps=1, **values):
  """Updates and state of the last of some steps with the same gradients."""
  config = OptimizerConfig(learning_rate=0.5, warmup_steps=2, memory_values=ValuesConfig(**values))
  optim = optimizer.adamw(config, 10)
  opt_state = optim.init(PARAMS)
  for _ in range(steps):
    updates, opt_state = optim.update(grads, opt_state, PARAMS)
  return updates, opt_state


def table(tree):
  return tree["shared"]["product_keys"]["values"]


def of(kernel, values):
  """Gradients of PARAMS, the same number everywhere in each."""
  return {
    "blocks": {"kernel": jnp.full((2, 3), kernel)},
    "shared": {"product_keys": {"values": jnp.full((4, 3), values)}},
  }


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_values_have_a_rate_of_their_own_on_the_same_schedule(steps):
  same, _ = stepped(of(1e-3, 1e-3), steps)
  own, _ = stepped(of(1e-3, 1e-3), steps, learning_rate=0.05)
  np.testing.assert_allclose(table(own), 0.1 * table(same), rtol=1e-5)
  np.testing.assert_array_equal(own["blocks"]["kernel"], same["blocks"]["kernel"])


def test_values_decay_by_their_own_rate():
  updates, _ = stepped(of(0.0, 0.0), 3, weight_decay=0.3, learning_rate=0.05)
  np.testing.assert_allclose(table(updates), -0.05 * 0.3 * 2.0, rtol=1e-5)
  np.testing.assert_allclose(updates["blocks"]["kernel"], -0.5 * 0.1 * 2.0, rtol=1e-5)


def test_values_are_clipped_apart_from_the_rest():
  """A huge gradient of one group leaves the other's as it is; the moments say what Adam was given."""

  def norms(grads, **values):
    adam = stepped(grads, **values)[1][1][0]
    return [float(optax.tree.norm(jax.tree.leaves(adam.mu[part]))) / 0.1 for part in ("blocks", "shared")]

  np.testing.assert_allclose(norms(of(0.1, 1e3), clip_norm=0.5), (0.1 * 6**0.5, 0.5), rtol=1e-5)
  np.testing.assert_allclose(norms(of(1e3, 0.1), clip_norm=0.5), (1.0, 0.1 * 12**0.5), rtol=1e-5)
  np.testing.assert_allclose(norms(of(0.1, 1e3), clip_norm=0.0)[1], 1e3 * 12**0.5, rtol=1e-5)


def test_lazily_only_rows_that_were_read_move():
  read = of(0.1, 0.1)
  grads = of(0.1, 0.1)
  grads["shared"]["product_keys"]["values"] = table(grads).at[1:3].set(0.0)
  config = OptimizerConfig(warmup_steps=0, memory_values=ValuesConfig(lazy=True))
  lazy, dense = (
    optimizer.adamw(dataclasses.replace(config, memory_values=ValuesConfig(lazy=flag)), 10) for flag in (True, False)
  )
  _, before = lazy.update(read, lazy.init(PARAMS), PARAMS)
  moved, after = lazy.update(grads, before, PARAMS)
  expected, same = dense.update(grads, before, PARAMS)
  np.testing.assert_array_equal(table(moved)[1:3], 0)
  np.testing.assert_array_equal(table(moved)[::3], table(expected)[::3])
  assert np.all(table(expected)[1:3] != 0)
  for old, new, plain in zip(*(jax.tree.leaves(s) for s in (before, after, same)), strict=True):
    if old.shape == (4, 3):
      np.testing.assert_array_equal(new[1:3], old[1:3])
      np.testing.assert_array_equal(new[::3], plain[::3])
    else:
      np.testing.assert_array_equal(new, plain)


def test_without_values_it_is_optax_adamw():
  params = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "norm": {"scale": jnp.ones(3)}}
  grads = jax.tree.map(lambda x: x + 1.0, params)
  config = OptimizerConfig(warmup_steps=0)
  plain = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optimizer.schedule(config, 10), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=optimizer.decayed),
  )
  results = [o.update(grads, o.init(params), params) for o in (optimizer.adamw(config, 10), plain)]
  assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
  jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("field", ["learning_rate", "weight_decay", "clip_norm"])
def test_bad_settings_of_values_are_named(field):
  (problem,) = OptimizerConfig(memory_values=ValuesConfig(**{field: -1.0})).problems()
  assert problem.startswith(f"optimizer.memory_values.{field} must be")
