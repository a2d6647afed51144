"""One tree: to a ConfigDict and back, checked whole, compared field by field."""

import dataclasses
import json

import pytest

from mc_jax.errors import ConfigError
from mc_jax.training import config


def test_the_tree_goes_to_a_config_dict_and_to_json_and_back():
  assert config.from_config_dict(config.default()) == config.Config()
  assert config.from_dict(json.loads(config.to_json(config.Config()))) == config.Config()


def test_unknown_fields_are_refused():
  tree = config.default()
  with pytest.raises(AttributeError, match="layers"):
    tree.model.layerz = 3
  with pytest.raises(ConfigError, match=r"ModelConfig has no field layerz; .*layers"):
    config.from_dict({"model": {"layerz": 3}})
  with pytest.raises(ConfigError, match=r"--config\.model\.memory\.agregation.*model\.memory\.aggregation"):
    config.require_field("model.memory.agregation")
  config.require_field("model.memory.aggregation")
  config.require_field("model.memory")


def test_types_are_kept():
  tree = config.default()
  with pytest.raises(TypeError):
    tree.model.layers = "two"
  tree.model.memory.implementation = "xla"
  with pytest.raises(TypeError):
    tree.model.memory.implementation = 3


def test_all_problems_are_told_at_once(tiny):
  bad = tiny(length=0, heads=3, learning_rate=-1.0, steps=0)
  with pytest.raises(ConfigError) as raised:
    bad.check()
  for field in ("data.length", "model.heads", "optimizer.learning_rate", "train.steps"):
    assert field in str(raised.value)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"layers": 2.0}, "model.layers must be int, got 2.0"),
    ({"layers": True}, "model.layers must be int, got True"),
    ({"learning_rate": "fast"}, "optimizer.learning_rate must be float, got 'fast'"),
    ({"keep_checkpoints": 1}, "train.keep_checkpoints must be at least 2, got 1"),
    ({"keep_every": 4}, "train.keep_every must be a multiple of train.checkpoint_every=3, got 4"),
    ({"keep_best": 1, "eval_every": 2}, "train.checkpoint_every must be a multiple of train.eval_every=2 with"),
    ({"hang_minutes": -1}, "train.hang_minutes must be at least 0"),
    ({"vocab_size": 100}, "model.vocab_size=100 must be at least 256"),
    ({"microbatches": 3}, "train.microbatches=3 does not divide data.batch_size=4: use one of 1, 2, 4"),
    ({"microbatches": 0}, "train.microbatches must be at least 1"),
    ({"eval_every": 0}, "train.eval_every must be at least 1"),
    ({"sample_temperature": -1.0}, "train.sample_temperature must be at least 0"),
    ({"sample_temperature": float("nan")}, "train.sample_temperature must be at least 0"),
    ({"beta2": 1.0}, "optimizer.beta2 must be at least 0 and below 1"),
    ({"final_fraction": 2.0}, "optimizer.final_fraction must be between 0 and 1"),
  ],
)
def test_bad_fields_are_named_with_what_would_do(tiny, fields, message):
  (problem,) = tiny(**fields).problems()
  assert message in problem


@pytest.mark.parametrize(
  ("memory", "fields", "names"),
  [
    ({"gate": "token"}, {"max_length": 8}, ("data.length=16", "model.max_length=8")),
    ({"segmentation": "logarithmic"}, {"documents": True}, ("logarithmic", "data.documents")),
  ],
)
def test_parts_that_do_not_go_together(tiny, memory, fields, names):
  options = dataclasses.replace(tiny().model.memory, **memory)
  (problem,) = tiny(memory=options, **fields).problems()
  assert all(name in problem for name in names)
  assert tiny(memory=options, pattern="attention", **fields).problems() == []


def test_types_within_lists_optional_fields_and_named_sources_are_looked_at(tiny):
  tree = dataclasses.asdict(tiny(learning_rate=1))  # a whole number is a number
  assert config.from_dict(tree).problems() == []
  tree["data"]["mqar"]["pairs"] = [4, "8"]
  tree["data"]["sources"] = {"books": {"weight": "much"}}
  tree["model"]["memory"]["max_step"] = "small"
  found = config.from_dict(tree).problems()
  assert found == [
    "data.mqar.pairs must be tuple[int, ...], got (4, '8')",
    "data.sources.books.weight must be float, got 'much'",
    "model.memory.max_step must be float | None, got 'small'",
  ]


def test_differences_name_fields_by_their_path(tiny):
  found = config.differences(tiny(), tiny(layers=2, steps=9))
  assert found == {"model.layers": (1, 2), "train.steps": (6, 9)}
