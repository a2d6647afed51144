"""Random configurations: each is refused with a message that names a field, or it builds and trains."""

import dataclasses
import re

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from mc_jax.data import windows
from mc_jax.errors import ConfigError
from mc_jax.training import config as config_lib
from mc_jax.training import state, step

# What is tried of a field: what works somewhere, and what works nowhere.
COUNTS = (-1, 0, 1, 2, 3, 4, 8)
NUMBERS = (-1.0, 0.0, 1e-9, 0.5, 1.0, 3.0, 1e6, float("nan"), float("inf"))
VALUES = {
  "data.source": ("text", "stdlib", "mqar", "copying", "tokens", "mixture", "texts"),
  "data.packing.method": ("windows", "concat", "best_fit", "none"),
  "data.packing.align": COUNTS,
  "data.length": (-1, 0, 1, 2, 7, 8, 16, 24),
  "data.batch_size": (0, 1, 2, 3, 4),
  "data.documents": (True, False),
  "data.validation_fraction": NUMBERS,
  "data.seed": (-1, 0, 2**32),
  "model.vocab_size": (1, 100, 256, 300),
  "model.layers": (0, 1, 2),
  "model.d_model": (0, 1, 6, 8, 16),
  "model.heads": COUNTS,
  "model.mlp_dim": COUNTS,
  "model.pattern": (("memory",), ("attention",), ("memory", "attention"), "memory", "mamba", ()),
  "model.feed_forward": (("swiglu",), ("swiglu", "swiglu"), ("product_keys",), "swiglu,product_keys", "mamba"),
  "model.product_keys.codebook": (*COUNTS, 4, 46341),
  "model.product_keys.heads": COUNTS,
  "model.product_keys.top_k": (*COUNTS, 16, 32),
  "model.product_keys.key_dim": (None, 0, 2, 3, 6),
  "model.product_keys.value_dim": (None, 0, 1, 5),
  "model.product_keys.plus": (True, False),
  "model.product_keys.qk_norm": (True, False),
  "model.product_keys.gate": (True, False),
  "model.product_keys.shared": (True, False),
  "model.conv_width": COUNTS,
  "model.max_length": (0, 8, 16, 64),
  "model.dtype": ("float32", "bfloat16", "float16"),
  "model.remat": ("full", "dots", "none", "some"),
  "model.tied_embeddings": (True, False),
  "model.attention.rope_theta": NUMBERS,
  "model.memory.rule": ("linear", "swla", "dla", "titans", "delta"),
  "model.memory.chunk": (*COUNTS, 64),
  "model.memory.depth": (0, 1, 2, 3),
  "model.memory.expansion": (0, 1, 2),
  "model.memory.norm": (True, False),
  "model.memory.retention": (True, False),
  "model.memory.max_grad_norm": (None, *NUMBERS),
  "model.memory.max_step": (None, *NUMBERS),
  "model.memory.window": COUNTS,
  "model.memory.aggregation": ("none", "residual", "grm", "soup", "ssc", "sum"),
  "model.memory.segmentation": ("constant", "logarithmic", "random"),
  "model.memory.segment_length": (*COUNTS, 16, 100),
  "model.memory.carry": ("checkpoint", "independent", "none"),
  "model.memory.top_k": (*COUNTS, 100),
  "model.memory.pool": ("mean", "sum", "max"),
  "model.memory.gate": ("softmax", "sigmoid", "constant", "uniform", "token", "tanh"),
  "model.memory.gate_scale": NUMBERS,
  "model.memory.shared_query": (True, False),
  "model.memory.after_training": (None, "moving_average", "grm", "soup"),
  "model.memory.segment_group": COUNTS,
  "model.memory.implementation": (None, "xla", "reference", "fast"),
  "optimizer.learning_rate": NUMBERS,
  "optimizer.warmup_steps": COUNTS,
  "optimizer.beta2": NUMBERS,
  "optimizer.clip_norm": NUMBERS,
  "optimizer.memory_values.learning_rate": (None, *NUMBERS),
  "optimizer.memory_values.weight_decay": NUMBERS,
  "optimizer.memory_values.clip_norm": NUMBERS,
  "optimizer.memory_values.lazy": (True, False),
  "train.steps": COUNTS,
  "train.microbatches": (0, 1, 2, 3, 4),
  "train.seed": (-1, 0, 7),
  "train.max_skipped": COUNTS,
  "train.keep_checkpoints": COUNTS,
  "mesh.model": (-1, 0, 1, 2),
}
WRONG = ("two", 2.5, None, True, (1,))  # of no, or of few, of the types

changes = st.lists(
  st.sampled_from(sorted(VALUES)).flatmap(
    lambda name: st.tuples(st.just(name), st.sampled_from(VALUES[name]) | st.sampled_from(VALUES[name] + WRONG))
  ),
  max_size=7,
).map(dict)


def _build(config):
  """(the step's function, mesh), or ConfigError; nothing runs."""
  mesh = config.check().make_mesh(jax.devices()[:1])
  update = step.train_step(config, mesh)
  with jax.set_mesh(mesh):
    jax.eval_shape(update, state.abstract(config, mesh), windows.shapes(config.data, mesh))
  return update, mesh


@pytest.fixture(scope="module")
def accepted():
  """Configurations that build."""
  return []


@pytest.mark.slow
def test_500_configurations_build_or_are_refused_by_a_fields_name(tiny, accepted):
  refused = []

  @hypothesis.settings(
    max_examples=500, deadline=None, derandomize=True, database=None, phases=[hypothesis.Phase.generate]
  )
  @hypothesis.given(changes)
  def attempt(fields):
    config = config_lib.replace(tiny(), fields)
    try:
      _build(config)
    except ConfigError as error:
      lines = str(error).splitlines()
      assert all(re.search(r"(data|model|optimizer|train|mesh)\.\w+", line) for line in lines), lines
      refused.append(config)
    else:
      accepted.append(config)

  attempt()
  assert len(accepted) >= 50
  assert len(refused) >= 50


@pytest.fixture
def quickly_compiled():
  """What runs once need not be fast."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
def test_25_of_them_train_a_step(accepted, quickly_compiled):
  distinct = sorted({repr(config): config for config in accepted}.items())
  for _, config in distinct[:: max(1, len(distinct) // 25)][:25]:
    update, mesh = _build(config)
    random = np.random.default_rng(0)

    def made(spec, name, config=config, random=random):
      if name in ("tokens", "targets"):
        return random.integers(0, config.model.vocab_size, spec.shape).astype(spec.dtype)
      return np.ones(spec.shape, spec.dtype)

    batch = {name: made(spec, name) for name, spec in windows.shapes(config.data, mesh).items()}
    abstract = state.abstract(config, mesh)
    start = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    params = jax.tree.map(lambda x, random=random: 0.3 * random.normal(size=x.shape).astype(x.dtype), abstract.params)
    with jax.set_mesh(mesh):  # parameters made here, for to make them as a run does compiles as long as a step
      after, values = jax.jit(update)(dataclasses.replace(start, params=params), batch)
    assert int(after.step) == 1
    assert np.isfinite(values["loss"]) or int(values["skipped"]) == 1, config
