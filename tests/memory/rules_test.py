"""The rules' options, names and starting values, and what is refused."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples

from mc_jax import memory
from mc_jax.memory import networks, rules


def printed(name, **options):
  """The rule as printed, whose steps are multiples of gradients."""
  return rules.get(name, **options, **({"normalized": False} if name in ("dla", "titans") else {}))


def test_the_gates_that_a_rule_needs():
  assert tuple(rules.get("linear").gates) == ()
  assert tuple(rules.get("swla").gates) == ("alpha", "eta0", "eta1")
  assert tuple(rules.get("swla", window=4).gates) == ("alpha", "eta0", "eta1", "eta2", "eta3")
  assert tuple(rules.get("dla").gates) == ("alpha", "eta")
  assert tuple(rules.get("dla", retention=False).gates) == ("eta",)
  assert tuple(rules.get("titans").gates) == ("alpha", "beta", "eta")


@pytest.mark.parametrize("name", memory.RULES)
def test_rules_are_static_arguments(name):
  rule = rules.get(name, chunk=16)
  assert rule.name == name
  assert hash(rule) == hash(rules.get(name, chunk=16))
  assert rule == rules.get(name, chunk=16)
  assert rule != rules.get(name, chunk=8)


@pytest.mark.parametrize("name", samples.GRADIENT_RULES)
def test_memories_start_as_matrices_of_zeros_or_as_networks_that_can_learn(name):
  rule = printed(name)
  init = samples.jit(functools.partial(rule.init, heads=3, head_dim=8))(jax.random.key(0))
  assert rule.learned_init == isinstance(rule.network, networks.MLP)
  if rule.learned_init:
    chex.assert_shape((init["w1"], init["w2"]), [(3, 8, 32), (3, 32, 8)])
    norms = {n: np.sqrt(np.square(w).sum((1, 2)).mean()) for n, w in init.items()}
    chex.assert_trees_all_close(norms, {"w1": np.sqrt(32), "w2": np.sqrt(8)}, rtol=0.15)
    assert not np.allclose(init["w1"][0], init["w1"][1])  # every head its own
  else:
    chex.assert_trees_all_equal(init, {"w": np.zeros((3, 8, 8), np.float32)})
  chex.assert_type(jax.tree.leaves(init), np.float32)


@pytest.mark.parametrize("name", samples.GRADIENT_RULES)
@pytest.mark.parametrize("segment_length", [1, 2, 3, 256])
def test_gates_start_where_no_memory_dies_or_blows_up(name, segment_length):
  rule = printed(name, chunk=16)
  starts = rule.gate_init(segment_length)
  assert tuple(starts) == tuple(rule.gates)
  value = {gate: start.maximum / (1 + np.exp(-start.bias)) for gate, start in starts.items()}
  if "alpha" in starts:
    assert starts["alpha"].maximum == 1
    assert 1 - value["alpha"] <= max(1 / segment_length, 0.5) + 1e-9
  if "beta" in starts:
    assert starts["beta"].maximum == 1
    np.testing.assert_allclose(value["beta"], 0.9)
  for step in rule.steps:  # gradients frozen over a chunk add up to one step
    largest = {"swla": 1.0, "dla": 1 / 16, "titans": (1 - 0.9) / 16}[name]
    np.testing.assert_allclose(starts[step].maximum, largest)
    np.testing.assert_allclose(value[step], largest / 2)


@pytest.mark.parametrize("name", ["swla", "dla", "titans"])
def test_the_largest_step_is_an_option(name):
  rule = rules.get(name, max_step=0.25)
  assert {rule.gate_init(64)[step].maximum for step in rule.steps} == {0.25}


@pytest.mark.parametrize("name", memory.RULES)
def test_starting_gates_are_what_gates_start_at(name):
  rule = rules.get(name)
  values = {gate: start.maximum / (1 + np.exp(-start.bias)) for gate, start in rule.gate_init(64).items()}
  assert rule.starting_gates(64) == pytest.approx(values)
  assert tuple(rule.starting_gates(64)) == tuple(rule.gates)


@pytest.mark.parametrize("segment_length", [1, 4, 64, 256, 4096])
def test_a_normalized_momentum_averages_over_part_of_a_segment(segment_length):
  beta = rules.get("titans").starting_gates(segment_length)["beta"]
  assert 1 <= 1 / (1 - beta) <= max(10, segment_length / 8) + 1e-6


def test_a_normalized_memory_starts_at_the_scale_of_unit_keys():
  rule = rules.get("titans", depth=3)
  init = samples.jit(functools.partial(rule.init, heads=4, head_dim=16))(jax.random.key(0))
  variances = {name: float(np.square(w).mean()) for name, w in init.items()}
  assert variances == pytest.approx({"w1": 1, "w2": 1 / (0.425 * 64), "w3": 1 / (64 * 16)}, rel=0.1)


def test_features_of_a_fresh_memory_are_as_large_at_every_depth():
  rule = rules.get("titans", depth=6)
  weights = samples.jit(functools.partial(rule.init, heads=4, head_dim=16))(jax.random.key(0))
  keys = np.random.default_rng(0).normal(size=(4, 256, 16))
  features = {}

  def linear(name, x):
    features[name] = x
    return x @ weights[name]

  rule.network(jnp.asarray(keys / np.linalg.norm(keys, axis=-1, keepdims=True)), linear)
  for layer in range(2, 7):
    assert 0.2 < jnp.square(features[f"w{layer}"]).mean() < 0.8, layer
    assert jnp.square(features[f"w{layer}"]).mean() > 5 * rule.network.least_features


def test_losses_are_sums_over_the_width_without_a_half():
  rng = np.random.default_rng(0)
  y, v = rng.normal(size=(2, 3, 5)).astype(np.float32)
  np.testing.assert_allclose(rules.dot_loss(y, v), -np.sum(y * v, -1), rtol=1e-6)
  np.testing.assert_allclose(rules.squared_loss(y, v), np.sum((y - v) ** 2, -1), rtol=1e-6)
  np.testing.assert_allclose(jax.grad(lambda y: rules.squared_loss(y, v).sum())(y), 2 * (y - v), rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    (
      "delta",
      {},
      f"rule must be one of {', '.join(memory.RULES)}; got 'delta'",
    ),
    ("linear", {"depth": 2}, "rule 'linear' takes chunk; got depth"),
    ("swla", {"expansion": 2, "depth": 1}, "rule 'swla' takes chunk, window, max_step; got depth, expansion"),
    ("titans", {"chunk": 0}, "chunk must be at least 1 token, got 0"),
    ("linear", {"chunk": -2}, "chunk must be at least 1 token, got -2"),
    ("swla", {"window": 1}, "window must be at least 2 tokens for swla, got 1"),
    ("titans", {"depth": 0}, "depth must be at least 1, got 0"),
    ("dla", {"expansion": 0}, "expansion must be at least 1, got 0"),
    ("dla", {"normalized": False, "max_grad_norm": 0.0}, "max_grad_norm must be positive or None, got 0.0"),
    ("swla", {"max_step": -1.0}, "max_step must be positive or None, got -1.0"),
    ("titans", {"normalized": False, "solve": True}, "solve needs normalized steps and the squared loss"),
    ("dla", {"max_grad_norm": 1.0}, "normalized steps need a step size, a window of 1, and no max"),
  ],
)
def test_bad_options_are_refused_by_name(name, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    rules.get(name, **options)


def test_a_rule_of_ones_own_is_checked_too():
  with pytest.raises(ValueError, match="window must be at least 1 token, got 0"):
    rules.GradientRule("mine", networks.Matrix(), rules.dot_loss, window=0)
  with pytest.raises(ValueError, match=r"rule must be one of linear, swla, dla, titans, .*; got 'mine'"):
    rules.options("mine")
