"""The Memory Caching layer: what it learns, for every rule and aggregation, and what it hands to the memories."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick_compile import jit

from mc_jax import memory
from mc_jax.models import MemoryConfig, ModelConfig
from mc_jax.models.layer import Context
from mc_jax.models.linear import Linear
from mc_jax.models.memory_caching import MemoryCaching, has_connector
from mc_jax.models.memory_config import AFTER_TRAINING
from mc_jax.parallel import context

# Each takes seconds to compile. ("titans", "grm") is in language_model_test.py as well.
FAST = [("titans", "soup"), ("dla", "none"), ("swla", "ssc"), ("linear", "residual")]
EVERY = [
  pytest.param(rule, aggregation, marks=[pytest.mark.slow] * ((rule, aggregation) not in FAST))
  for rule in ("linear", "swla", "dla", "titans")  # the others are those of forms_test.py
  for aggregation in memory.AGGREGATIONS
]


def tiny(**memory_options) -> ModelConfig:
  options = {"chunk": 2, "segment_length": 4, "expansion": 2, **memory_options}
  return ModelConfig(d_model=8, heads=2, max_length=12, memory=MemoryConfig(**options))


def rngs():
  return nnx.Rngs(jax.random.key(0, impl="rbg"))


def make(config):
  return MemoryCaching(config, rngs=rngs())


def tokens(config, batch=1, length=12):
  x = np.random.default_rng(0).normal(size=(batch, length, config.d_model))
  return jnp.asarray(x, jnp.float32)


def assert_everything_learns(config):
  """Every parameter gets a gradient that is finite and not zero; returns the parameters' paths."""
  graph, parameters = nnx.split(make(config))
  x = tokens(config)
  gradients = jit(jax.grad(lambda p: jnp.square(nnx.merge(graph, p)(x)[0]).sum()))(parameters)
  flat = {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(gradients)}
  chex.assert_tree_all_finite(flat)
  projections = flat.pop("projection/kernel")
  flat |= {f"projection/{i}": projections[:, i] for i in range(projections.shape[1])}
  for path, gradient in flat.items():
    assert jnp.abs(gradient).max() > 0, path
  return set(flat)


@pytest.mark.parametrize(("rule", "aggregation"), EVERY)
def test_every_parameter_learns(rule, aggregation):
  paths = assert_everything_learns(tiny(rule=rule, aggregation=aggregation))
  assert ("projection/4" in paths) == (aggregation in ("grm", "soup", "ssc"))
  assert ("initial/w1" in paths) == (rule in ("dla", "titans"))
  assert ("token_gates/bias" in paths) == (rule != "linear")


@pytest.mark.parametrize("options", [{"gate": "token"}, {"gate": "sigmoid", "pool": "sum"}], ids=str)
def test_every_parameter_learns_with_the_other_gates(options):
  paths = assert_everything_learns(tiny(rule="linear", **options))
  assert ("age_scores/kernel" in paths) == (options["gate"] == "token")
  assert ("projection/4" in paths) == (options["gate"] == "sigmoid")


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({"aggregation": "grm"}, True),
    ({"aggregation": "soup", "gate": "sigmoid"}, True),
    ({"aggregation": "ssc", "gate": "constant"}, True),  # it chooses by the scores all the same
    ({"aggregation": "grm", "gate": "constant"}, False),
    ({"aggregation": "ssc", "gate": "token"}, False),
    ({"aggregation": "grm", "shared_query": True}, False),
    ({"aggregation": "residual"}, False),
    ({"aggregation": "none"}, False),
  ],
  ids=str,
)
def test_there_is_a_connector_only_where_scores_come_from_it(options, expected):
  assert has_connector(tiny(**options)) == expected


@pytest.mark.parametrize("kind", AFTER_TRAINING)
def test_after_training_a_model_without_caches_reads_them_by_the_parameters_it_has(kind):
  config = tiny(rule="linear", aggregation="none", after_training=kind)
  mixer, x = make(config), tokens(config)
  without = make(tiny(rule="linear", aggregation="none"))
  chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(mixer)), nnx.to_pure_dict(nnx.state(without)))

  @jit
  def by_hand(x):
    inputs = mixer.project(x)
    q, k, v = inputs.tokens[:3]
    u = 0 * q if kind == "moving_average" else q  # equal scores are equal shares; for matrices soup = grm
    y = memory.memory_caching(
      *(q, k, v, u, {}, mixer.initial_memory()),
      rule=mixer.rule,
      aggregation="grm",
      segmentation=memory.segments.constant(4),
    )
    return mixer.read_out(y, inputs)

  y, forgetful = jit(mixer)(x)[0], jit(without)(x)[0]
  chex.assert_trees_all_close(y, by_hand(x), rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_close(y[:, :4], forgetful[:, :4], rtol=1e-4, atol=1e-5)
  assert not np.allclose(y[:, 4:], forgetful[:, 4:], rtol=1e-2)


def test_the_memories_get_keys_and_queries_of_unit_length_and_gates_in_their_range():
  config = tiny()
  mixer = make(config)
  inputs = jit(mixer.project)(tokens(config)).tokens
  for x in (inputs.q, inputs.k):
    chex.assert_trees_all_close(jnp.linalg.norm(x, axis=-1), jnp.ones((1, 12, 2)), rtol=1e-3)
  chex.assert_equal_shape([inputs.q, inputs.k, inputs.v, inputs.u])
  assert set(inputs.gates) == set(mixer.rule.gates)
  assert inputs.token_scores is None


def test_the_connector_is_a_plain_linear_map_and_shared_on_request():
  config = tiny()
  mixer = make(config)
  x = tokens(config)
  project = jit(mixer.project)
  chex.assert_trees_all_close(project(2 * x).tokens.u, 2 * project(x).tokens.u, rtol=1e-5)
  shared = jit(make(tiny(shared_query=True)).project)(x).tokens
  chex.assert_trees_all_equal(shared.u, shared.q)


@pytest.mark.slow
def test_a_deep_memory_that_has_written_nothing_says_nothing():
  """Where M_0's answer is not read; of a printed rule it always is."""

  def largest(**options):
    config = tiny(aggregation="grm", **options)
    mixer = make(config)
    if config.memory.normalized:
      mixer.initial_norm.scale[...] = jnp.zeros_like(mixer.initial_norm.scale[...])
    document = jnp.array([[1] * 8 + [0] * 4])
    inputs = jit(mixer.project)(tokens(config), document)
    idle = inputs.tokens._replace(v=jnp.zeros_like(inputs.tokens.v))
    idle = idle._replace(gates=idle.gates | {"eta": 1e-9 * idle.gates["eta"]})
    y = memory.run(idle, mixer.initial_memory(), config.memory.build_options())
    return jnp.abs(mixer.read_out(y, inputs, document)).max(-1)[0]

  for rule in ("titans", "dla"):
    assert largest(rule=rule).max() < 1e-2
    printed = largest(rule=rule, normalized=False)
    assert printed[:8].min() > 1e-2 and printed[8:].max() == 0


def test_token_scores_have_an_age_for_every_segment():
  config = tiny(gate="token")
  scores = jax.eval_shape(make(config).project, tokens(config)).tokens.token_scores
  chex.assert_shape(scores, (1, 12, 2, 3))
  chex.assert_type(scores, jnp.float32)


def test_the_parts_make_the_whole():
  """What a decoder will call, step by step, is what the layer does."""
  config = tiny(rule="linear")
  mixer = make(config)
  x = tokens(config)

  @jit
  def by_hand(x):
    inputs = mixer.project(x)
    y = memory.memory_caching(
      *inputs.tokens[:5],
      mixer.initial_memory(),
      rule=mixer.rule,
      aggregation="grm",
      segmentation=memory.segments.constant(4),
    )
    y /= jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
    return mixer.output(y * jax.nn.silu(inputs.output_gate))

  chex.assert_trees_all_close(jit(mixer.__call__)(x)[0], by_hand(x), atol=1e-5)


def test_options_reach_the_memories(monkeypatch):
  options = {
    "aggregation": "ssc",
    "carry": "independent",
    "top_k": 3,
    "pool": "sum",
    "gate": "token",
    "gate_scale": 4.0,
    "segment_group": 5,
    "implementation": "reference",
  }
  given = {}

  def run(tokens, init, options, **kwargs):
    given.update(vars(options) | tokens._asdict() | kwargs)
    return jnp.zeros_like(tokens.q)

  monkeypatch.setattr(context, "run", run)
  config = tiny(rule="swla", window=3, segmentation="logarithmic", **options)
  document = jnp.ones((1, 12), jnp.int32)
  jax.eval_shape(lambda x: make(config)(x, Context(document)), tokens(config))
  assert {name: given[name] for name in options} == options
  assert given["rule"] == memory.rules.get("swla", chunk=2, window=3)
  assert given["segmentation"] == memory.segments.logarithmic()
  assert given["documents"] is not None
  assert given["token_scores"].shape == (1, 12, 2, 4)


def test_a_matrix_memory_starts_at_zero_and_a_deep_one_at_its_parameters():
  assert not hasattr(make(tiny(rule="linear")), "initial")
  chex.assert_trees_all_equal(make(tiny(rule="linear")).initial_memory(), {"w": jnp.zeros((2, 4, 4))})
  deep = make(tiny(depth=3))
  chex.assert_trees_all_equal(deep.initial_memory(), {k: w[...] for k, w in deep.initial.items()})
  chex.assert_shape(deep.initial_memory()["w2"], (2, 8, 8))
  chex.assert_type(list(deep.initial_memory().values()), jnp.float32)


def test_linear_maps_unit_variance_to_the_asked_one():
  x = np.random.default_rng(0).normal(size=(64, 8, 32)).astype(np.float32)
  inputs, outputs = {"heads": 8, "head_dim": 32}, {"embed": 128}
  for scale in (1.0, 0.25):
    y = Linear(inputs, outputs, scale=scale, rngs=rngs())(x)
    chex.assert_shape(y, (64, 128))
    assert 0.9 * scale < y.std() < 1.1 * scale
  y = Linear(inputs, outputs, dtype=jnp.bfloat16, rngs=rngs())(x)
  assert y.dtype == jnp.bfloat16
