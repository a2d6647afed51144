"""Scores continuations of given contexts, or lets the model write them.

Contexts may have any length and order. They are put into batches of few shapes, because each shape compiles a program.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from mc_jax.data import PackingConfig, tokenizers, windows
from mc_jax.data.windows import Batch
from mc_jax.evaluation import scoring
from mc_jax.evaluation.subject import Subject
from mc_jax.inference import Decoder, Request, generation
from mc_jax.inference.text import Stream, follow, stops
from mc_jax.models import CacheConfig

STEP = 32  # estimated cost of a decoding step in tokens of a forward pass; it does not affect results


class Pair(NamedTuple):
  """A context, int32 [tokens], of at least one token, and a continuation, int32 [tokens]."""

  context: np.ndarray
  continuation: np.ndarray


class Likelihood(NamedTuple):
  """log p(continuation | context) in nats, and whether every token is the likeliest after those before it."""

  log_probability: float
  greedy: bool


def likelihoods(
  subject: Subject, pairs: Sequence[Pair], progress: Callable[[int], object] = lambda count: None
) -> list[Likelihood]:
  """The likelihood of each continuation.

  A forward pass reads context and continuation together. Several continuations of one context can be cheaper: the
  context is read once, its cache repeated, and the continuations are read from there token by token. That is done if it
  saves more than STEP tokens per step, and always for continuations of one token, which need no step. With
  segmentation="logarithmic" segments depend on the sequence's length: then only forward passes are used.

  Args:
    subject: The model; batches have about as many tokens as those of its run.
    pairs: Contexts and continuations in any order.
    progress: Called with the number of pairs that were just scored.
  """
  likelihoods = [Likelihood(0.0, True)] * len(pairs)
  alone, shared = _plan(subject, pairs)
  for places, scores in itertools.chain(_by_steps(subject, pairs, shared), _by_forward(subject, pairs, alone)):
    for place, score in zip(places, scores, strict=False):  # the others only fill a batch
      likelihoods[place] = score
    progress(len(places))
  return likelihoods


def written(
  subject: Subject,
  tokenizer: tokenizers.Tokenizer,
  requests: Sequence[Request],
  until: Sequence[Sequence[str]],
  progress: Callable[[int], object] = lambda count: None,
) -> list[str]:
  """The text that the model writes after each prompt, up to the first of its stop texts or the end of the document.

  Args:
    subject: The model, as for `likelihoods`.
    tokenizer: The tokenizer of the subject's run.
    requests: Requests without `stop`, which follows from `until`.
    until: The texts that end each continuation, which does not include them.
    progress: Called with the number of requests that were just met.

  Raises:
    ConfigError: A model that cannot be decoded.
  """
  texts = [""] * len(requests)
  for tokens, places in _grouped(lambda i: bucket(len(requests[i].prompt) + requests[i].max_tokens), len(requests)):
    decoder = _decoder(subject, tokens)
    for batch in _chunks(places, subject.rows_of(tokens).batch_size):
      streams = {i: Stream(tokenizer.decode, until[i]) for i in batch}
      asked = [dataclasses.replace(requests[i], stop=stops(tokenizer, until[i])) for i in batch]
      missing = subject.rows_of(tokens).batch_size - len(batch)
      blocks = decoder.generate([*asked, *[dataclasses.replace(asked[0], max_tokens=1)] * missing])
      for _ in follow(blocks, list(streams.values()), tokenizer):
        pass
      for i, stream in streams.items():
        texts[i] = stream.text() + stream.rest()
      progress(len(batch))
  return texts


def bucket(tokens: int) -> int:
  """The first of 16, 24, 32, 48, 64, 96, ... that is at least `tokens`."""
  power = max(16, 1 << (tokens - 1).bit_length())
  return power // 4 * 3 if power > 16 and tokens <= power // 4 * 3 else power


def _plan(subject: Subject, pairs: Sequence[Pair]) -> tuple[list[int], list[list[int]]]:
  """The indices of pairs to score by forward passes, and groups of indices that share a context."""
  config = nnx.merge(subject.graph, subject.params).config
  decodable = not CacheConfig(1).problems(config) and subject.mesh.shape["context"] == 1
  groups = collections.defaultdict(list)
  for i, pair in enumerate(pairs):
    if len(pair.continuation):
      groups[np.asarray(pair.context, np.int32).tobytes()].append(i)
  alone, shared = [], []
  for group in groups.values():
    steps = max(len(pairs[i].continuation) for i in group) - 1
    if decodable and (len(group) - 1) * len(pairs[group[0]].context) > STEP * steps:
      shared.append(group)
    else:
      alone += group
  return alone, shared


Scores = Iterator[tuple[list[int], Sequence[Likelihood]]]  # of these pairs, and possibly more that fill a batch


def _by_forward(subject: Subject, pairs: Sequence[Pair], places: Sequence[int]) -> Scores:
  def size(n: int) -> int:
    pair = pairs[places[n]]
    return bucket(len(pair.context) + len(pair.continuation) - 1)

  for length, group in _grouped(size, len(places)):
    data = dataclasses.replace(subject.rows_of(length), documents=False, packing=PackingConfig())
    for chunk in _chunks([places[n] for n in group], data.batch_size):
      batches = windows.batches([_row(pairs[i], length) for i in chunk], data.batch_size)
      (scored,) = subject.score(data, batches)
      counts = scored.batch["weights"] > 0
      sums = -np.sum(scored.loss, axis=1, where=counts, dtype=np.float64)
      yield chunk, list(map(Likelihood, sums.tolist(), (scored.right | ~counts).all(1).tolist()))


def _row(pair: Pair, length: int) -> Batch:
  """Context and continuation as a row in which only the continuation has weight."""
  ids = np.concatenate([pair.context, pair.continuation])
  row = {name: np.zeros(length, dtype) for name, dtype in (("tokens", np.int32), ("targets", np.int32))}
  row["tokens"][: len(ids) - 1] = ids[:-1]
  row["targets"][: len(ids) - 1] = ids[1:]
  row["weights"] = np.zeros(length, np.float32)
  row["weights"][len(pair.context) - 1 : len(ids) - 1] = 1
  return row


def _by_steps(subject: Subject, pairs: Sequence[Pair], groups: Sequence[list[int]]) -> Scores:
  def shape(n: int) -> tuple[int, int]:
    longest = max(len(pairs[i].continuation) for i in groups[n])
    return bucket(len(pairs[groups[n][0]].context) + longest - 1), len(groups[n])

  for (tokens, count), numbers in _grouped(shape, len(groups)):
    decoder = _decoder(subject, tokens)
    rows = max(1, subject.rows_of(tokens).batch_size // count)
    for chunk in _chunks([groups[n] for n in numbers], rows):
      filled = [*chunk, *[chunk[0]] * (rows - len(chunk))]
      start = generation.repeat(*decoder.prefill([pairs[group[0]].context for group in filled]), count)
      scores = _steps(decoder, *start, [pairs[i].continuation for group in filled for i in group])
      yield [i for group in chunk for i in group], scores


def _steps(decoder: Decoder, logits: jax.Array, cache, continuations: list[np.ndarray]) -> list[Likelihood]:
  continuations += [np.zeros(0, np.int32)] * (len(logits) - len(continuations))  # rows that only fill a mesh
  sums, greedy = np.zeros(len(continuations)), np.ones(len(continuations), bool)
  longest = max(map(len, continuations))
  for i in range(longest):
    tokens = [continuation[i : i + 1] for continuation in continuations]
    present = np.array([len(token) > 0 for token in tokens])
    loss, right = jax.device_get(_scores(logits, np.array([token[0] if len(token) else 0 for token in tokens])))
    sums -= np.where(present, loss, 0)
    greedy &= right | ~present
    if i + 1 < longest:
      logits, cache = decoder.extend(cache, tokens, logits)
  return list(map(Likelihood, sums.tolist(), greedy.tolist()))


@jax.jit
def _scores(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """-log p(target) in nats, and whether the target is the likeliest token: logits [b, vocab_size], targets [b]."""
  return scoring.losses(logits, targets), logits.argmax(-1) == targets


def _decoder(subject: Subject, tokens: int) -> Decoder:
  config = nnx.merge(subject.graph, subject.params).config
  mesh = subject.mesh if subject.mesh.size > 1 else None
  return Decoder(config, subject.graph, subject.params, CacheConfig(tokens), mesh)


def _grouped(key: Callable[[int], object], count: int) -> list[tuple[object, list[int]]]:
  """0 to count - 1 grouped by their keys, the greatest key first, so that a lack of memory shows at once."""
  groups = collections.defaultdict(list)
  for i in range(count):
    groups[key(i)].append(i)
  return sorted(groups.items(), reverse=True)


def _chunks(items: list, size: int) -> Iterator[list]:
  return (items[first : first + size] for first in range(0, len(items), size))
