"""Recall tasks: is the likeliest token the answer's, at every token of the answer?

A whole row is given to the model at once, each token of an answer after the true ones before it: it is right at all of
them exactly where it would have written the answer by itself, taking the likeliest token each time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from mc_jax.data import DataConfig
from mc_jax.data.windows import Batch
from mc_jax.evaluation.scoring import Scored
from mc_jax.evaluation.subject import Options, Result, Subject


class Setting(NamedTuple):
  """What a task asks of a model at one length.

  Attributes:
    settings: of its result, such as {"length": 64, "pairs": 8}.
    data: that describes the batches.
    batches: rows whose targets with weight 1 are the answers.
  """

  settings: dict[str, int]
  data: DataConfig
  batches: list[Batch]


Rows = Callable[[Subject, Options], Iterator[Setting]]
Count = Callable[[Scored], tuple[np.ndarray, np.ndarray]]


def accuracy(name: str, rows: Rows, count: Count) -> Callable[[Subject, Options], Iterator[Result]]:
  """The task `name`: the share of what is right, as `count` counts it, in each setting."""

  def run(subject: Subject, options: Options) -> Iterator[Result]:
    for settings, data, batches in rows(subject, options):
      yield _result(name, settings, subject.score(data, batches), count)

  return run


def mqar(subject: Subject, options: Options) -> Iterator[Setting]:
  """Rows of each length and number of pairs."""
  for settings, own in _mqar_settings(subject.data, options):
    yield _setting(subject, "mqar", settings, own, options.rows)


def niah(needle: str) -> Rows:
  """Rows of each length; `needle` is one of data/recall/niah.TASKS."""

  def rows(subject: Subject, options: Options) -> Iterator[Setting]:
    own = _settings_of(subject.data, "niah")
    own["niah"] = dataclasses.replace(own["niah"], tasks=(needle,))
    for length in options.lengths or (subject.data.length,):
      yield _setting(subject, "niah", {"length": length}, own, options.rows)

  return rows


def problems(name: str, data: DataConfig, options: Options) -> list[str]:
  """Why rows of a recall task cannot be made, one line each."""
  if name != "mqar":  # which prompts fit depends on the tokenizer
    return []
  every = (own["mqar"].problems("data.mqar", settings["length"]) for settings, own in _mqar_settings(data, options))
  return [problem for found in every for problem in found]


def answers_of_rows(scored: Scored) -> tuple[np.ndarray, np.ndarray]:
  """(answers that are right, answers), by row, where each target that counts is an answer."""
  asked = scored.batch["weights"] > 0
  return (scored.right & asked).sum(1), asked.sum(1)


def rows_as_a_whole(scored: Scored) -> tuple[np.ndarray, np.ndarray]:
  """(1 where all targets that count are right, 1), by row; 0 and 0 where a row only fills up its batch."""
  right, asked = answers_of_rows(scored)
  return ((right == asked) & (asked > 0)).astype(int), (asked > 0).astype(int)


def _mqar_settings(data: DataConfig, options: Options) -> Iterator[tuple[dict[str, int], dict]]:
  """Each length and number of pairs, and the fields of the data that make such rows."""
  own = _settings_of(data, "mqar")
  for length in options.lengths or (data.length,):
    for pairs in options.pairs or own["mqar"].pairs:
      yield {"length": length, "pairs": pairs}, own | {"mqar": dataclasses.replace(own["mqar"], pairs=(pairs,))}


def _settings_of(data: DataConfig, task: str) -> dict:
  """How the run makes the rows of a task, if it does; else the defaults of data.TASK."""
  part = next((part for part in data.parts.values() if part.source == task), None)
  return {"source": task, "sources": {}, "paths": part.paths if part else "", task: getattr(part or data, task)}


def _setting(subject: Subject, task: str, settings: dict[str, int], own: dict, rows: int) -> Setting:
  length = settings["length"]
  data = dataclasses.replace(subject.rows_of(length), **own, validation_tokens=rows * length)
  return Setting(settings, data, subject.load(data, task).validation[task].batches)


def _result(task: str, settings: dict, scored: list[Scored], count: Count) -> Result:
  right, asked = (np.concatenate(arrays) for arrays in zip(*map(count, scored), strict=True))
  rows = int((asked > 0).sum())
  accuracy = right.sum() / asked.sum()
  # Answers of a row stand and fall together: rows are what is drawn independently.
  stderr = np.sqrt(np.sum((right - accuracy * asked) ** 2)) / asked.sum()
  tokens = sum(float(s.batch["weights"].sum()) for s in scored)
  loss = sum(float(np.sum(s.loss * s.batch["weights"], dtype=np.float64)) for s in scored) / tokens
  values = {"accuracy": float(accuracy), "stderr": float(stderr), "loss": loss, "rows": rows}
  return Result(task, settings, values)
