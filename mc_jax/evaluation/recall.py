"""Recall tasks: is the likeliest token the answer's, at every token of the answer?

A whole row is given to the model at once, each token of an answer after the true ones before it: it is right at all of
them exactly where it would have written the answer by itself, taking the likeliest token each time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from mc_jax.data import DataConfig
from mc_jax.evaluation.scoring import Scored
from mc_jax.evaluation.subject import Options, Result, Subject


def mqar(subject: Subject, options: Options) -> Iterator[Result]:
  """Accuracy over all keys asked for, at each length and number of pairs."""
  settings = _settings_of(subject.data, "mqar")
  for length in options.lengths or (subject.data.length,):
    for pairs in options.pairs or settings["mqar"].pairs:
      of_pairs = settings | {"mqar": dataclasses.replace(settings["mqar"], pairs=(pairs,))}
      scored = _score(subject, "mqar", of_pairs, length, options.rows)
      yield _result("mqar", {"length": length, "pairs": pairs}, scored, answers_of_rows)


def niah(name: str, needle: str) -> Callable[[Subject, Options], Iterator[Result]]:
  """The task `name`: accuracy over rows at each length; `needle` is one of data/recall/niah.TASKS."""

  def run(subject: Subject, options: Options) -> Iterator[Result]:
    settings = _settings_of(subject.data, "niah")
    settings["niah"] = dataclasses.replace(settings["niah"], tasks=(needle,))
    for length in options.lengths or (subject.data.length,):
      scored = _score(subject, "niah", settings, length, options.rows)
      yield _result(name, {"length": length}, scored, rows_as_a_whole)

  return run


def answers_of_rows(scored: Scored) -> tuple[np.ndarray, np.ndarray]:
  """(answers that are right, answers), by row, where each target that counts is an answer."""
  asked = scored.batch["weights"] > 0
  return (scored.right & asked).sum(1), asked.sum(1)


def rows_as_a_whole(scored: Scored) -> tuple[np.ndarray, np.ndarray]:
  """(1 where all targets that count are right, 1), by row; 0 and 0 where a row only fills up its batch."""
  right, asked = answers_of_rows(scored)
  return ((right == asked) & (asked > 0)).astype(int), (asked > 0).astype(int)


def _settings_of(data: DataConfig, task: str) -> dict:
  """How the run makes the rows of a task, if it does; else the defaults of data.TASK."""
  part = next((part for part in data.parts.values() if part.source == task), None)
  return {"source": task, "sources": {}, "paths": part.paths if part else "", task: getattr(part or data, task)}


def _score(subject: Subject, task: str, settings: dict, length: int, rows: int) -> list[Scored]:
  data = subject.rows_of(length)
  data = dataclasses.replace(data, **settings, validation_tokens=rows * length)
  batches = subject.load(data, task).validation[task].batches
  return subject.score(data, batches)


def _result(task: str, settings: dict, scored: list[Scored], count: Callable) -> Result:
  right, asked = (np.concatenate(arrays) for arrays in zip(*map(count, scored), strict=True))
  rows = int((asked > 0).sum())
  accuracy = right.sum() / asked.sum()
  # Answers of a row stand and fall together: rows are what is drawn independently.
  stderr = np.sqrt(np.sum((right - accuracy * asked) ** 2)) / asked.sum()
  tokens = sum(float(s.batch["weights"].sum()) for s in scored)
  loss = sum(float(np.sum(s.loss * s.batch["weights"], dtype=np.float64)) for s in scored) / tokens
  values = {"accuracy": float(accuracy), "stderr": float(stderr), "loss": loss, "rows": rows}
  return Result(task, settings, values)
