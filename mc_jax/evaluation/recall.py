"""Accuracy on recall tasks: is the likeliest token right at every token of an answer? And what facts take in bits.

The model reads a whole row at once, each token of an answer after the true ones before it. It is right at all of them
exactly if greedy decoding would write the answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from mc_jax.data import DataConfig
from mc_jax.data.windows import Batch
from mc_jax.evaluation.scoring import Scored
from mc_jax.evaluation.subject import Options, Result, Subject


class Setting(NamedTuple):
  """The rows of a task in one setting.

  Attributes:
    settings: The settings of its result, such as {"length": 64, "pairs": 8}.
    data: The configuration of the batches.
    batches: Batches whose targets with weight 1 are the answers.
  """

  settings: dict[str, int]
  data: DataConfig
  batches: list[Batch]


Rows = Callable[[Subject, Options], Iterator[Setting]]
Count = Callable[[Scored], tuple[np.ndarray, np.ndarray]]


def accuracy(name: str, rows: Rows, count: Count) -> Callable[[Subject, Options], Iterator[Result]]:
  """The task `name`: the share of right answers, as counted by `count`, in each setting."""

  def run(subject: Subject, options: Options) -> Iterator[Result]:
    for settings, data, batches in rows(subject, options):
      yield _result(name, settings, subject.score(data, batches), count)

  return run


def mqar(subject: Subject, options: Options) -> Iterator[Setting]:
  """Rows of each length and number of pairs."""
  for settings, fields in _mqar_settings(subject.data, options):
    yield _setting(subject, "mqar", settings, fields, options.rows)


def niah(needle: str) -> Rows:
  """Rows of each length; `needle` is one of data/recall/niah.TASKS."""

  def rows(subject: Subject, options: Options) -> Iterator[Setting]:
    fields = _fields(subject.data, "niah")
    fields["niah"] = dataclasses.replace(fields["niah"], tasks=(needle,))
    for length in options.lengths or (subject.data.length,):
      yield _setting(subject, "niah", {"length": length}, fields, options.rows)

  return rows


def facts(subject: Subject, options: Options) -> Iterator[Result]:
  """The task `facts`: accuracy on facts of the run's world, and how much of that world the model knows, at each length.

  With V equally likely values and a loss of b bits an answer, the model knows log2(V) - b bits of each fact:
  `bits_stored` is that times the number of facts in the world, estimated from the facts of `options.rows` rows, and
  `bits_per_parameter` is `bits_stored` over the number of parameters. Both are of the values alone, without the names
  that arXiv:2404.05405 counts as well, and negative for a model that is worse than guessing.
  """
  fields = _fields(subject.data, "facts")
  world = fields["facts"]
  parameters = sum(leaf.size for leaf in jax.tree.leaves(subject.params))
  for length in options.lengths or (subject.data.length,):
    settings, data, batches = _setting(subject, "facts", {"length": length}, fields, options.rows)
    result = _result("facts", settings, subject.score(data, batches), answers_of_rows)
    bits = result.values["loss"] / math.log(2)
    stored = world.count * (math.log2(world.value_ids) - bits)
    knowledge = {"bits_per_answer": bits, "bits_stored": stored, "parameters": parameters}
    if parameters:
      knowledge["bits_per_parameter"] = stored / parameters
    yield dataclasses.replace(result, values=result.values | knowledge)


def problems(name: str, data: DataConfig, options: Options) -> list[str]:
  """Why rows of a recall task cannot be generated, one line each."""
  if name == "facts":
    config = _fields(data, "facts")["facts"]
    found = [config.problems("data.facts", length) for length in options.lengths or (data.length,)]
    return list(dict.fromkeys(line for lines in found for line in lines))
  if name != "mqar":  # which prompts fit depends on the tokenizer
    return []
  settings_of = _mqar_settings(data, options)
  return [line for s, fields in settings_of for line in fields["mqar"].problems("data.mqar", s["length"])]


def answers_of_rows(scored: Scored) -> tuple[np.ndarray, np.ndarray]:
  """(number of right answers, number of answers) of each row, where each target with weight is an answer."""
  asked = scored.batch["weights"] > 0
  return (scored.right & asked).sum(1), asked.sum(1)


def rows_as_a_whole(scored: Scored) -> tuple[np.ndarray, np.ndarray]:
  """(1 if all targets with weight are right, 1) for each row; (0, 0) for rows that only fill the batch."""
  right, asked = answers_of_rows(scored)
  return ((right == asked) & (asked > 0)).astype(int), (asked > 0).astype(int)


def _mqar_settings(data: DataConfig, options: Options) -> Iterator[tuple[dict[str, int], dict]]:
  """Each length and number of pairs, with the fields of the data configuration for such rows."""
  fields = _fields(data, "mqar")
  for length in options.lengths or (data.length,):
    for pairs in options.pairs or fields["mqar"].pairs:
      yield {"length": length, "pairs": pairs}, fields | {"mqar": dataclasses.replace(fields["mqar"], pairs=(pairs,))}


def _fields(data: DataConfig, task: str) -> dict:
  """Fields of the data configuration for rows of a task: as in the run if it has the task, else those of data.TASK."""
  source = next((source for source in data.parts.values() if source.source == task), None)
  return {"source": task, "sources": {}, "paths": source.paths if source else "", task: getattr(source or data, task)}


def _setting(subject: Subject, task: str, settings: dict[str, int], fields: dict, rows: int) -> Setting:
  length = settings["length"]
  data = dataclasses.replace(subject.rows_of(length), **fields, validation_tokens=rows * length)
  return Setting(settings, data, subject.load(data, task).validation[task].batches)


def _result(task: str, settings: dict, scored: list[Scored], count: Count) -> Result:
  right, asked = (np.concatenate(arrays) for arrays in zip(*map(count, scored), strict=True))
  rows = int((asked > 0).sum())
  accuracy = right.sum() / asked.sum()
  # The answers of a row are not independent of each other; rows are.
  stderr = np.sqrt(np.sum((right - accuracy * asked) ** 2)) / asked.sum()
  tokens = sum(float(s.batch["weights"].sum()) for s in scored)
  loss = sum(float(np.sum(s.loss * s.batch["weights"], dtype=np.float64)) for s in scored) / tokens
  values = {"accuracy": float(accuracy), "stderr": float(stderr), "loss": loss, "rows": rows}
  return Result(task, settings, values)
