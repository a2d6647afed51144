"""Loss, perplexity and bits per byte on a run's validation text, by position and at several lengths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from absl import logging

from mc_jax.data import identity
from mc_jax.data.windows import Batch
from mc_jax.errors import ConfigError
from mc_jax.evaluation import scoring
from mc_jax.evaluation.scoring import Scored
from mc_jax.evaluation.subject import Options, Result, Subject


def run(subject: Subject, options: Options) -> Iterator[Result]:
  """A result for each length and source of text and, with several sources, one for all text.

  Shorter rows are pieces of the longest ones: at every length the same targets are scored, with less or more context.

  Raises:
    ConfigError: A length does not divide the longest, or the run has no text.
  """
  lengths = sorted(set(options.lengths)) or [subject.data.length]
  longest = lengths[-1]
  if line := problem(lengths):
    raise ConfigError(line)
  data = subject.rows_of(longest)
  dataset = subject.load(data, "perplexity")
  if subject.trained is not None and (line := identity.unlike(subject.trained, dataset.identity)):
    logging.warning("the data differ from those of training, so other documents may be held out: %s", line)
  texts = {name: text for name, text in dataset.validation.items() if text.unit == "byte"}
  if not texts:
    sources = ", ".join(dict.fromkeys(part.source for part in data.parts.values()))
    raise ConfigError(
      f"perplexity is of text; the data of this run are recall tasks alone ({sources}): their loss is "
      "validation_bits_per_answer in metrics.jsonl, and --tasks has some for mqar and niah"
    )
  for length in lengths:
    pieces = longest // length
    shorter = dataclasses.replace(data, length=length, batch_size=data.batch_size * pieces)
    scored = {name: subject.score(shorter, [cut(b, length) for b in text.batches]) for name, text in texts.items()}
    for name in texts:
      yield _result({"length": length, "source": name}, scored[name], texts[name].count)
    if len(texts) > 1:
      every = [batch for batches in scored.values() for batch in batches]
      yield _result({"length": length, "source": "all"}, every, sum(text.count for text in texts.values()))


def problem(lengths: Sequence[int]) -> str | None:
  """Why rows cannot be cut to these lengths, or None."""
  longest = max(lengths, default=1)
  if odd := [length for length in lengths if longest % length]:
    return (
      f"--lengths of perplexity must divide the longest, {longest}, so that all score the same text; "
      f"got {', '.join(map(str, odd))}"
    )
  return None


def cut(batch: Batch, length: int) -> Batch:
  """Rows cut to `length`, which divides theirs: [b, l] arrays to [b l / length, length]."""
  return {name: array.reshape(-1, length) for name, array in batch.items()}


def positions(batch: Batch) -> np.ndarray:
  """The number of tokens before each token in its document, or in its row: int [batch, length]."""
  place = np.broadcast_to(np.arange(batch["tokens"].shape[1]), batch["tokens"].shape)
  if "segment_ids" not in batch:
    return place
  ids = batch["segment_ids"]
  starts = np.concatenate([np.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
  return place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)


def edges(length: int) -> list[int]:
  """The edges of buckets [first, end) of positions: 0, 16, 24, 32, 48, 64, ... up to `length`."""
  bounds = [0]
  step = 16
  while step < length:
    bounds += [step, step + step // 2]
    step *= 2
  return [bound for bound in bounds if bound < length] + [length]


def by_position(scored: Iterable[Scored], length: int) -> tuple[dict[str, float], ...]:
  """The mean loss in nats in each bucket of positions, without empty buckets."""
  bounds = edges(length)
  losses, counts = np.zeros((2, len(bounds) - 1))
  for s in scored:
    bucket = np.searchsorted(bounds, positions(s.batch), side="right") - 1
    losses += np.bincount(bucket.ravel(), (s.loss * s.batch["weights"]).ravel(), len(losses))
    counts += np.bincount(bucket.ravel(), s.batch["weights"].ravel(), len(losses))
  return tuple(
    {"from": first, "to": end, "tokens": int(count), "loss": float(loss / count)}
    for first, end, count, loss in zip(bounds, bounds[1:], counts, losses, strict=False)
    if count
  )


def _result(settings: dict, scored: list[Scored], count: float) -> Result:
  bits = scoring.bits(scored)
  tokens = sum(float(s.batch["weights"].sum()) for s in scored)
  loss = bits * math.log(2) / tokens
  values = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits / count, "tokens": int(tokens)}
  return Result("perplexity", settings, values, by_position(scored, settings["length"]))
