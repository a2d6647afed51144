"""Subjects that need no model: what they answer is known."""

import dataclasses
import pathlib
import sys

import numpy as np
import pytest

from mc_jax.evaluation import Subject
from mc_jax.evaluation.scoring import Scored

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for `import plain`


@pytest.fixture
def oracle(tiny, alone):
  """Makes a Subject: oracle(answer, **fields) answer(batch) -> (loss, right), [batch, length], scores."""

  class Oracle(Subject):
    def score(self, data, batches):
      for batch in batches:
        assert batch["tokens"].shape == (data.batch_size, data.length)
      return [Scored(batch, *map(np.asarray, self.graph(batch))) for batch in batches]

  def make(answer, vocab_size=256, **fields):
    data = fields.pop("data", None) or tiny().data
    return Oracle(answer, {}, vocab_size, dataclasses.replace(data, **fields), alone)

  return make
