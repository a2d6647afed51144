"""Accuracy of models whose answers are known."""

import numpy as np
import pytest

from mc_jax.data.recall import MQARConfig
from mc_jax.errors import ConfigError
from mc_jax.evaluation import Options, tasks

VOCAB = MQARConfig(vocab_size=64)


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


@pytest.mark.parametrize(
  ("names", "options", "fields", "message"),
  [
    (["niah4", "mqar"], {}, {}, "gates_niah3, or lm_eval:TASK for one of lm-evaluation-harness; got niah4"),
    ([], {}, {}, "got none"),
    (["mqar"], {"lengths": (16,), "pairs": (8,)}, {"mqar": VOCAB}, "data.length must be even and at least 32"),
    (["mqar"], {}, {"length": 64}, "mqar needs a model.vocab_size of at least 8192"),
    (["mqar"], {"rows": 0}, {}, "--rows must be at least 1"),
    (["mqar"], {"lengths": (0,)}, {}, "--lengths must be numbers of at least 1"),
    (["niah2"], {"lengths": (100,)}, {}, "use at least 3"),
  ],
)
def test_what_cannot_be_is_told(oracle, names, options, fields, message):
  with pytest.raises(ConfigError) as raised:
    list(tasks.run(names, oracle(every_other_row, **fields), Options(**options)))
  assert message in str(raised.value)
