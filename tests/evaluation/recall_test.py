"""Accuracy of models whose answers are known."""

import dataclasses

import numpy as np
import pytest

from mc_jax.data.recall import FactsConfig, MQARConfig, facts
from mc_jax.errors import ConfigError
from mc_jax.evaluation import Options, tasks

VOCAB = MQARConfig(vocab_size=64)
WORLD = FactsConfig(count=300, value_ids=16, name_ids=16)  # 1,200 bits


def every_other_row(batch):
  """Right in rows 0, 2, ...; in the others at all answer tokens but the first."""
  first = np.cumsum(batch["weights"], axis=1) == 1
  wrong = first & (batch["weights"] > 0) & (np.arange(len(first)) % 2 == 1)[:, None]
  return batch["weights"] * 2.0, ~wrong


def test_mqar_counts_answers(oracle):
  subject = oracle(every_other_row, length=32, batch_size=4, mqar=VOCAB)
  results = list(tasks.run(["mqar"], subject, Options(lengths=(32, 64), pairs=(2, 8), rows=10)))
  assert [r.settings for r in results] == [{"length": n, "pairs": p} for n in (32, 64) for p in (2, 8)]
  assert [r.values["accuracy"] for r in results] == [0.75, 1 - 1 / 16] * 2
  assert results[0].values["rows"] == 10  # three batches, the last one half full
  assert results[0].values["stderr"] == pytest.approx(0.25 / np.sqrt(10))
  assert results[0].values["loss"] == pytest.approx(2)


def test_pairs_are_the_runs_by_default(oracle):
  subject = oracle(every_other_row, length=32, mqar=MQARConfig(vocab_size=64, pairs=(1, 4)))
  assert [r.settings["pairs"] for r in tasks.run(["mqar"], subject, Options(rows=2))] == [1, 4]


def test_needles_count_where_all_of_the_answer_is_right(oracle):
  subject = oracle(every_other_row, length=512, batch_size=4)
  results = list(tasks.run(["niah1", "niah2", "niah3", "niah1"], subject, Options(rows=6)))
  assert [r.task for r in results] == ["niah1", "niah2", "niah3"]
  assert [r.values["accuracy"] for r in results] == [0.5] * 3
  assert [r.values["rows"] for r in results] == [6] * 3


def knowing(probability):
  """An oracle that gives the true answers this probability, and all other ids less."""
  return lambda batch: (np.full(batch["targets"].shape, -np.log(probability)), np.ones(batch["targets"].shape, bool))


@pytest.mark.parametrize(("probability", "bits"), [(1, 1200), (1 / 2, 900), (1 / 16, 0), (1 / 64, -600)])
def test_facts_count_the_bits_that_are_known(oracle, probability, bits):
  subject = oracle(knowing(probability), length=64, batch_size=4, facts=WORLD)
  (result,) = tasks.run(["facts"], subject, Options(rows=6))
  assert result.settings == {"length": 64}
  assert result.values["accuracy"] == 1 and result.values["rows"] == 6
  assert result.values["bits_per_answer"] == pytest.approx(-np.log2(probability))
  assert result.values["bits_stored"] == pytest.approx(bits)


def test_facts_are_those_of_the_runs_world(oracle):
  """An oracle that has the world by heart, and looks at nothing else of the row, is always right."""

  def by_heart(world):
    known = {tuple(fact[:-1]): fact[-1] for fact in facts.world(world)}

    def answer(batch):
      keys = np.lib.stride_tricks.sliding_window_view(np.pad(batch["tokens"], ((0, 0), (2, 0))), 3, axis=1)
      said = np.array([[known.get(tuple(key), -1) for key in row] for row in keys])
      return np.zeros(said.shape), said == batch["targets"]

    return answer

  def accuracies(known, asked, **fields):
    subject = oracle(by_heart(known), length=64, batch_size=4, facts=asked, **fields)
    return [result.values["accuracy"] for result in tasks.run(["facts"], subject, Options(rows=6, lengths=(16, 64)))]

  assert accuracies(WORLD, WORLD) == [1, 1]
  assert accuracies(WORLD, WORLD, seed=5) == [1, 1]  # other rows, the same world
  assert max(accuracies(WORLD, dataclasses.replace(WORLD, world=1))) < 0.3


@pytest.mark.parametrize(
  ("names", "options", "fields", "message"),
  [
    (["niah4", "mqar"], {}, {}, "usage, or lm_eval:TASK for one of lm-evaluation-harness; got niah4"),
    ([], {}, {}, "got none"),
    (["mqar"], {"lengths": (16,), "pairs": (8,)}, {"mqar": VOCAB}, "data.length must be even and at least 32"),
    (["mqar"], {}, {"length": 64}, "mqar needs a model.vocab_size of at least 8192"),
    (["facts"], {"lengths": (3,)}, {"facts": WORLD}, "facts: data.length must be at least 4"),
    (
      ["facts"],
      {},
      {"facts": FactsConfig(name_ids=300)},
      "facts needs a model.vocab_size of at least 369",
    ),
    (["mqar"], {"rows": 0}, {}, "--rows must be at least 1"),
    (["mqar"], {"lengths": (0,)}, {}, "--lengths must be numbers of at least 1"),
    (["niah2"], {"lengths": (100,)}, {}, "use at least 3"),
  ],
)
def test_what_cannot_be_is_told(oracle, names, options, fields, message):
  with pytest.raises(ConfigError) as raised:
    list(tasks.run(names, oracle(every_other_row, **fields), Options(**options)))
  assert message in str(raised.value)
