"""The Memory Caching mixer: what it learns, for every rule and aggregation, and what it hands to the memories."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mc_jax import memory
from mc_jax.models import MemoryConfig, ModelConfig
from mc_jax.models.linear import Linear
from mc_jax.models.mixer import MemoryCaching

# See language_model_test.py.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

FAST = [("titans", aggregation) for aggregation in memory.AGGREGATIONS] + [
  (rule, "grm") for rule in memory.RULES if rule != "titans"
]
EVERY = [
  pytest.param(rule, aggregation, marks=[pytest.mark.slow] * ((rule, aggregation) not in FAST))
  for rule in memory.RULES
  for aggregation in memory.AGGREGATIONS
]


def tiny(**memory_options) -> ModelConfig:
  options = {"chunk": 2, "segment_length": 4, "expansion": 2, **memory_options}
  return ModelConfig(d_model=8, heads=2, max_length=12, memory=MemoryConfig(**options))


def make(config, seed=0):
  return MemoryCaching(config, rngs=nnx.Rngs(jax.random.key(seed, impl="rbg")))


def tokens(config, batch=1, length=12):
  return jax.random.normal(jax.random.key(1), (batch, length, config.d_model))


def assert_everything_learns(config):
  """Every parameter gets a gradient that is finite and not zero; returns the parameters' paths."""
  graph, parameters = nnx.split(make(config))
  x = tokens(config)
  gradients = jit(jax.grad(lambda p: jnp.square(nnx.merge(graph, p)(x)).sum()))(parameters)
  flat = {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(gradients)}
  chex.assert_tree_all_finite(flat)
  for path, gradient in flat.items():
    assert jnp.abs(gradient).max() > 0, path
  return set(flat)


@pytest.mark.parametrize(("rule", "aggregation"), EVERY)
def test_every_parameter_learns(rule, aggregation):
  paths = assert_everything_learns(tiny(rule=rule, aggregation=aggregation))
  assert ("connector/kernel" in paths) == (aggregation in ("grm", "soup", "ssc"))
  assert ("initial/w1" in paths) == (rule in ("dla", "titans"))
  assert ("token_gates/bias" in paths) == (rule != "linear")


@pytest.mark.parametrize(
  "options",
  [
    {"gate": "token"},
    {"gate": "sigmoid", "pool": "sum"},
    {"gate": "constant"},
    {"shared_query": True},
    {"segmentation": "logarithmic"},
  ],
  ids=str,
)
def test_every_parameter_learns_with_the_other_gates(options):
  paths = assert_everything_learns(tiny(rule="linear", **options))
  assert ("connector/kernel" in paths) == ("segmentation" in options or options.get("gate") == "sigmoid")
  assert ("age_scores/kernel" in paths) == (options.get("gate") == "token")


def test_the_memories_get_keys_and_queries_of_unit_length_and_gates_in_their_range():
  config = tiny()
  mixer = make(config)
  inputs = mixer.project(tokens(config))
  for x in (inputs.q, inputs.k):
    chex.assert_trees_all_close(jnp.linalg.norm(x, axis=-1), jnp.ones((1, 12, 2)), rtol=1e-3)
  chex.assert_equal_shape([inputs.q, inputs.k, inputs.v, inputs.u])
  assert tuple(inputs.gates) == mixer.rule.gates
  assert inputs.token_scores is None


def test_the_connector_is_a_plain_linear_map_and_shared_on_request():
  config = tiny()
  mixer = make(config)
  x = tokens(config)
  chex.assert_trees_all_close(mixer.project(2 * x).u, 2 * mixer.project(x).u, rtol=1e-5)
  shared = make(tiny(shared_query=True)).project(x)
  chex.assert_trees_all_equal(shared.u, shared.q)


def test_token_scores_have_an_age_for_every_segment():
  config = tiny(gate="token")
  scores = make(config).project(tokens(config)).token_scores
  chex.assert_shape(scores, (1, 12, 2, 3))
  chex.assert_type(scores, jnp.float32)


def test_the_parts_make_the_whole():
  """What a decoder will call, step by step, is what the layer does."""
  config = tiny(rule="linear")
  mixer = make(config)
  x = tokens(config)
  inputs = mixer.project(x)
  y = memory.memory_caching(
    *inputs[:4],
    inputs.gates,
    mixer.initial_memory(),
    rule=mixer.rule,
    aggregation="grm",
    segmentation=memory.segments.constant(4),
  )
  expected = jnp.square(y) / (jnp.square(y).mean(-1, keepdims=True) + 1e-6)  # norm and gate by hand
  expected = jnp.sign(y) * jnp.sqrt(expected) * jax.nn.silu(mixer.output_gate(x))
  chex.assert_trees_all_close(mixer(x), mixer.output(expected), atol=1e-4)


def test_options_reach_the_memories():
  """Each changes what the mixer computes: none is dropped on the way."""
  x = tokens(tiny())
  base = {"rule": "linear", "chunk": 4, "segment_length": 2}

  def run(**options):
    config = tiny(**{**base, **options})
    return np.asarray(make(config)(x))

  reference = run()
  for options in (
    {"aggregation": "residual"},
    {"aggregation": "ssc", "top_k": 1},
    {"segmentation": "logarithmic"},
    {"segment_length": 3},
    {"carry": "independent"},
    {"pool": "sum"},
    {"gate": "sigmoid"},
    {"gate_scale": 4.0},
  ):
    assert np.abs(run(**options) - reference).max() > 1e-4, options
  assert np.abs(run(aggregation="ssc", top_k=1) - run(aggregation="ssc", top_k=3)).max() > 1e-4
  # These change how it is computed, and not what.
  for options in ({"chunk": 2}, {"implementation": "reference"}):
    chex.assert_trees_all_close(run(**options), reference, atol=1e-4)
  independent = run(carry="independent")
  chex.assert_trees_all_close(run(carry="independent", segment_group=2), independent, atol=1e-5)


def test_a_matrix_memory_starts_at_zero_and_a_deep_one_at_its_parameters():
  assert not hasattr(make(tiny(rule="linear")), "initial")
  chex.assert_trees_all_equal(make(tiny(rule="linear")).initial_memory(), {"w": jnp.zeros((2, 4, 4))})
  deep = make(tiny(depth=3))
  chex.assert_trees_all_equal(deep.initial_memory(), {k: w[...] for k, w in deep.initial.items()})
  chex.assert_shape(deep.initial_memory()["w2"], (2, 8, 8))
  chex.assert_type(list(deep.initial_memory().values()), jnp.float32)


def test_linear_maps_unit_variance_to_the_asked_one():
  x = jax.random.normal(jax.random.key(0), (64, 8, 32))
  inputs, outputs = {"heads": 8, "head_dim": 32}, {"embed": 128}
  for scale in (1.0, 0.25):
    y = Linear(inputs, outputs, scale=scale, rngs=nnx.Rngs(0))(x)
    chex.assert_shape(y, (64, 128))
    assert 0.9 * scale < y.std() < 1.1 * scale
  y = Linear(inputs, outputs, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x)
  assert y.dtype == jnp.bfloat16
