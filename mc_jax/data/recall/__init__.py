"""Recall tasks as data: rows made from a seed, whose loss counts the answers and nothing else.

A task is a frozen configuration and a pure function

    row(config, length, rng) -> {"tokens": int32 [length], "targets": int32 [length], "weights": float32 [length]}

with weight 1 where the target is part of an answer. Whatever it draws, it draws from `rng`. `problems(prefix, length)`
of a configuration lists what cannot work, in rows of that many tokens; `vocab_size` is the number of ids that rows may
hold, None where that is the tokenizer's. A task that reads text also takes `encode` and `words` (see `niah.row`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mc_jax.data.recall import copying, facts, mqar, niah, prose
from mc_jax.data.recall.copying import CopyingConfig
from mc_jax.data.recall.facts import FactsConfig
from mc_jax.data.recall.mqar import MQARConfig
from mc_jax.data.recall.niah import NIAHConfig


class Task(NamedTuple):
  """A recall task: the class of its configuration, its rows, and whether they are made of text."""

  config: type
  row: Callable
  reads_text: bool


TASKS = {
  "mqar": Task(MQARConfig, mqar.row, reads_text=False),
  "niah": Task(NIAHConfig, niah.row, reads_text=True),
  "copying": Task(CopyingConfig, copying.row, reads_text=False),
  "facts": Task(FactsConfig, facts.row, reads_text=False),
}

__all__ = [
  "TASKS",
  "CopyingConfig",
  "FactsConfig",
  "MQARConfig",
  "NIAHConfig",
  "Task",
  "copying",
  "facts",
  "mqar",
  "niah",
  "prose",
]
