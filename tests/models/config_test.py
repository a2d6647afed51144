"""Problems are found all at once, each naming its field and what would be valid."""

import dataclasses
import subprocess
import sys

import pytest

from mc_jax import memory
from mc_jax.models import LanguageModel, MemoryConfig, ModelConfig
from mc_jax.models.config import completed


def test_the_defaults_have_no_problems():
  assert ModelConfig().problems() == []


@pytest.mark.parametrize(
  ("field", "value", "valid"),
  [
    ("vocab_size", 1, "at least 2"),
    ("layers", 0, "at least 1"),
    ("heads", 0, "at least 1"),
    ("heads", 3, "1, 2, 4, 8"),
    ("mlp_dim", -1, "at least 0"),
    ("pattern", ("mamba",), "memory, attention"),
    ("feed_forward", ("mamba",), "swiglu"),
    ("conv_width", 0, "at least 1"),
    ("dtype", "float16", "float32, bfloat16"),
    ("remat", "some", "full, dots, none"),
    ("attention.rope_theta", 0.0, "positive"),
    ("memory.rule", "delta", "linear, swla, dla, titans"),
    ("memory.aggregation", "sum", "none, residual, grm, soup, ssc"),
    ("memory.segmentation", "fenwick", "constant, logarithmic"),
    ("memory.carry", "reset", "checkpoint, independent"),
    ("memory.pool", "max", "mean, sum"),
    ("memory.gate", "tanh", "softmax, sigmoid, constant, uniform, token"),
    ("memory.implementation", "cuda", "xla"),
    ("memory.after_training", "soup", "None, moving_average, grm"),
    ("memory.after_training", "moving_average", "aggregation='none', got 'grm'"),
    ("memory.chunk", 0, "at least 1"),
    ("memory.segment_length", -256, "at least 1"),
    ("memory.top_k", 0, "at least 1"),
    ("memory.depth", 0, "at least 1"),
    ("memory.expansion", 0, "at least 1"),
    ("memory.window", 1, "at least 2"),
    ("memory.segment_group", 0, "at least 1"),
    ("memory.gate_scale", float("nan"), "positive"),
    ("memory.max_step", 0.0, "positive"),
    ("memory.max_grad_norm", -1.0, "at least 0"),
  ],
)
def test_a_problem_names_its_field_and_what_is_valid(field, value, valid):
  config = _replace(ModelConfig(d_model=64), field, value)
  (problem,) = config.problems()
  listed = ",".join(value) if isinstance(value, tuple) else value
  assert problem.startswith((f"model.{field}={listed}", f"model.{field}={value!r}"))
  assert valid in problem


def test_all_problems_are_found_at_once():
  config = ModelConfig(layers=0, heads=3, memory=MemoryConfig(top_k=0, rule="delta"))
  problems = config.problems(prefix="config.model")
  assert len(problems) == 4
  assert all(problem.startswith("config.model.") for problem in problems)


def test_rotary_positions_need_an_even_head():
  config = ModelConfig(d_model=12, heads=4, pattern="attention")
  assert "multiple of 2 heads" in config.problems()[0]
  assert dataclasses.replace(config, pattern="memory").problems() == []


def test_options_of_writing_that_exclude_each_other_are_refused():
  (problem,) = MemoryConfig(normalized=False, solve=True).problems()
  assert "memory.solve=True needs memory.normalized=True" in problem
  (problem,) = MemoryConfig(max_grad_norm=2.0).problems()
  assert problem.startswith("memory.max_grad_norm=2.0 clips the printed rules: it needs memory.normalized=False")
  assert MemoryConfig(max_grad_norm=0.0).problems() == []
  assert MemoryConfig(rule="linear", max_grad_norm=2.0).problems() == []  # which reads neither
  assert MemoryConfig().build_rule().solve


@pytest.mark.parametrize("aggregation", ["none", "residual"])
@pytest.mark.parametrize(("field", "value"), [("gate", "sigmoid"), ("pool", "sum"), ("shared_query", True)])
def test_what_only_gates_read_is_refused_without_gates(aggregation, field, value):
  (problem,) = MemoryConfig(aggregation=aggregation, **{field: value}).problems()
  assert problem.startswith(f"memory.{field}={value!r} has no effect with memory.aggregation={aggregation!r}")
  assert "one of grm, soup, ssc" in problem
  assert MemoryConfig(aggregation="grm", **{field: value}).problems() == []


def test_caches_after_training_may_have_a_gate_of_their_own():
  assert MemoryConfig(aggregation="none", after_training="grm", pool="sum").problems() == []


def test_a_transformer_has_nothing_to_cache_after_training():
  memory = MemoryConfig(aggregation="none", after_training="grm")
  assert ModelConfig(memory=memory).problems() == []
  assert (
    "needs memories: a model.pattern with memory, got attention"
    in ModelConfig(pattern="attention", memory=memory).problems()[0]
  )


def test_a_model_refuses_a_config_with_problems():
  with pytest.raises(ValueError, match=r"model\.layers=0 .*\n.*memory\.top_k=0"):
    LanguageModel(ModelConfig(layers=0, memory=MemoryConfig(top_k=0)), rngs=None)


@pytest.mark.parametrize("rule", memory.RULES)
def test_the_rule_gets_the_options_that_it_takes(rule):
  built = MemoryConfig(rule=rule, chunk=16).build_rule()
  assert built == memory.rules.get(rule, chunk=16)


@pytest.mark.parametrize(
  "reading", [{"aggregation": "soup"}, {"aggregation": "none", "after_training": "moving_average"}]
)
def test_memories_of_different_scales_are_not_added_up(reading):
  (problem,) = ModelConfig(memory=MemoryConfig(rule="mlstm", **reading)).problems()
  assert "adds up the weights of memories, and model.memory.rule='mlstm' gives each a scale of its own" in problem
  assert ModelConfig(memory=MemoryConfig(rule="mlstm", aggregation="grm")).problems() == []


def test_a_memory_that_always_learns_where_it_starts_is_not_told_to():
  (problem,) = ModelConfig(memory=MemoryConfig(rule="titans", learned_init=False)).problems()
  assert "model.memory.learned_init=False has no effect with model.memory.rule='titans': use None, or one of" in problem


def test_options_reach_the_rule():
  assert MemoryConfig(rule="kda", learned_init=True).build_rule().learned_init
  assert MemoryConfig(rule="swla", window=3).build_rule().window == 3
  assert MemoryConfig(rule="titans", depth=4, expansion=2).build_rule().network.depth == 4
  assert tuple(MemoryConfig(rule="dla", retention=False).build_rule().gates) == ("eta",)
  assert MemoryConfig(rule="titans", max_step=0.5).build_rule().max_step == 0.5


def test_inner_gradients_are_clipped_as_the_rule_has_it_unless_told():
  def clip(**options):
    return MemoryConfig(**options).build_rule().max_grad_norm

  default = memory.rules.get("titans", normalized=False).max_grad_norm
  assert default is not None
  assert clip(normalized=False) == default
  assert clip(normalized=False, max_grad_norm=3.0) == 3.0
  assert clip(normalized=False, max_grad_norm=0.0) is None
  assert clip() is None


def test_a_stored_model_without_newer_fields_is_what_it_was():
  """Memories that wrote as printed, when there was nothing else; ssc that never read all caches."""
  old = dataclasses.asdict(ModelConfig())
  for name in ("normalized", "solve", "dense_steps"):
    del old["memory"][name]
  assert completed(old)["memory"] == {**old["memory"], "normalized": False, "dense_steps": 0}
  linear = completed({**old, "memory": {**old["memory"], "rule": "linear"}})["memory"]
  assert "normalized" not in linear  # which has always been what it is
  new = dataclasses.asdict(ModelConfig())
  assert completed(new) == new


def test_there_are_ages_for_every_row_that_fits():
  for segmentation in memory.segments.NAMES:
    config = ModelConfig(max_length=70, memory=MemoryConfig(segmentation=segmentation, segment_length=16))
    cut = config.memory.build_segmentation()
    assert config.ages >= max(len(cut.lengths(length)) for length in range(1, 71))


def test_the_mlp_is_two_thirds_of_four_times_the_width_by_default():
  assert ModelConfig(d_model=768).hidden_dim == 2048
  assert ModelConfig(d_model=1000, mlp_dim=0).hidden_dim == 2688  # 2666.7 rounded up to 64
  assert ModelConfig(d_model=768, mlp_dim=100).hidden_dim == 100


def _replace(config, field, value):
  head, _, rest = field.partition(".")
  if rest:
    value = _replace(getattr(config, head), rest, value)
  return dataclasses.replace(config, **{head: value})


def test_a_check_of_a_config_touches_no_device():
  """Processes of a job find each other after their configuration was checked, and must before JAX looks for devices."""
  code = """
from jax._src import xla_bridge
from mc_jax import memory
from mc_jax.models import MemoryConfig, ModelConfig
for rule in memory.RULES:
  ModelConfig(memory=MemoryConfig(rule=rule)).problems()
  assert not xla_bridge.backends_are_initialized(), rule
"""
  subprocess.run([sys.executable, "-c", code], check=True)
