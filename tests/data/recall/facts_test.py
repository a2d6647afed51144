import dataclasses

import numpy as np
import pytest

from mc_jax.data import DataConfig, datasets
from mc_jax.data.recall import FactsConfig, facts
from mc_jax.errors import ConfigError

SMALL = FactsConfig(count=50, attributes=3, value_ids=8, name_ids=5, name_length=2)
FIRST_ATTRIBUTE = 1 + 5


def stated(row, config):
  """The facts of a row, [facts, name_length + 2], in its order."""
  size = int(row["weights"].sum()) * config.tokens
  return row["tokens"][:size].reshape(-1, config.tokens)


@pytest.mark.parametrize("name_length", [1, 2, 3])
@pytest.mark.parametrize("length", [16, 23])
@pytest.mark.parametrize("seed", range(3))
def test_a_row_states_different_facts_of_the_world_and_asks_for_their_values(seed, length, name_length):
  config = dataclasses.replace(SMALL, count=15, name_length=name_length)
  row = facts.row(config, length, np.random.default_rng(seed))
  assert {name: (array.shape, array.dtype.name) for name, array in row.items()} == {
    "tokens": ((length,), "int32"),
    "targets": ((length,), "int32"),
    "weights": ((length,), "float32"),
  }
  told = stated(row, config)
  assert len(told) == length // (name_length + 2)
  assert not row["tokens"][told.size :].any()
  world = {tuple(fact) for fact in facts.world(config)}
  assert len({tuple(fact) for fact in told}) == len(told) and {tuple(fact) for fact in told} <= world

  (asked,) = np.nonzero(row["weights"])
  assert (row["weights"][asked] == 1).all()
  np.testing.assert_array_equal(row["tokens"][asked], told[:, -2])  # at the attribute
  np.testing.assert_array_equal(row["targets"][asked], told[:, -1])  # the value, which only comes after
  np.testing.assert_array_equal(row["targets"], np.append(row["tokens"][1:], 0))


def test_the_world_has_one_value_for_every_entity_and_attribute():
  world = facts.world(SMALL)
  names, attributes, values = world[:, :2], world[:, 2], world[:, 3]
  assert len(world) == 50 and len({tuple(key) for key in world[:, :3]}) == 50
  assert len({tuple(name) for name in names}) == SMALL.entities == 17
  assert (names.min(), names.max()) == (1, 5)
  assert set(attributes) == {FIRST_ATTRIBUTE, FIRST_ATTRIBUTE + 1, FIRST_ATTRIBUTE + 2}
  assert values.min() == FIRST_ATTRIBUTE + 3 and values.max() == SMALL.vocab_size - 1


def test_values_are_uniform():
  config = FactsConfig(count=40_000, value_ids=16)
  counts = np.bincount(facts.world(config)[:, -1])[-16:]
  assert np.sum((counts - 2500) ** 2 / 2500) < 37.7  # chi-square of 15 degrees of freedom, p = 0.001


def test_rows_are_a_function_of_their_seed_and_the_world_of_its_own():
  def row(seed, config=SMALL):
    return facts.row(config, 32, np.random.default_rng(seed))["tokens"]

  np.testing.assert_array_equal(row(3), row(3))
  assert (row(3) != row(4)).any()
  other = dataclasses.replace(SMALL, world=1)
  assert (row(3) != row(3, other)).any()
  assert (facts.world(SMALL) != facts.world(other)).any()


def test_training_and_validation_rows_are_of_one_world():
  """What is asked was told in other rows, and rows themselves do not repeat."""
  config = DataConfig(source="facts", facts=SMALL, length=16, batch_size=4, validation_tokens=4 * 16)
  data = datasets.load(config)
  rows = [data.training(shard).row(i) for shard in range(4) for i in range(40)]
  again = datasets.load(config).training(1).row(7)
  np.testing.assert_array_equal(again["tokens"], rows[40 + 7]["tokens"])
  told = {tuple(fact) for row in rows for fact in stated(row, SMALL)}
  assert told == {tuple(fact) for fact in facts.world(SMALL)}
  assert len({tuple(row["tokens"]) for row in rows}) == len(rows)
  (batch,) = data.validation["facts"].batches
  for tokens, weights in zip(batch["tokens"], batch["weights"], strict=True):
    assert {tuple(fact) for fact in stated({"tokens": tokens, "weights": weights}, SMALL)} <= told
    assert tuple(tokens) not in {tuple(row["tokens"]) for row in rows}
  assert data.unit == "answer" and data.vocab_size == SMALL.vocab_size


@pytest.mark.parametrize(
  ("fields", "length", "message"),
  [
    ({"count": 0}, 64, r"facts\.count must be at least 1, got 0"),
    ({"attributes": 0}, 64, r"facts\.attributes must be at least 1"),
    ({"value_ids": 1}, 64, r"facts\.value_ids must be at least 2"),
    ({"name_ids": 0}, 64, r"facts\.name_ids must be at least 1"),
    ({"name_length": 0}, 64, r"facts\.name_length must be at least 1"),
    ({"world": -1}, 64, r"facts\.world must be between 0 and"),
    ({"count": 76}, 64, r"facts\.count=76 needs 26 names, .* make 25: use at most 75 facts"),
    ({}, 3, r"data\.length must be at least 4"),
  ],
)
def test_what_cannot_be_is_refused_by_name(fields, length, message):
  with pytest.raises(ConfigError, match=message):
    facts.row(dataclasses.replace(SMALL, **fields), length, np.random.default_rng(0))


def test_the_smallest_sizes_work():
  facts.row(dataclasses.replace(SMALL, count=75), 4, np.random.default_rng(0))
  row = facts.row(
    FactsConfig(count=1, attributes=1, value_ids=2, name_ids=1, name_length=1), 8, np.random.default_rng(0)
  )
  assert row["weights"].sum() == 1  # a world of one fact is told once a row
