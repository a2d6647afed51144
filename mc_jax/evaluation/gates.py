"""Measures which memories each answer token reads, given the one that holds its answer.

Memories are numbered: 0 is the online memory, 1 + i the cache of segment i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_jax import memory
from mc_jax.data import DataConfig, windows
from mc_jax.data.windows import Batch
from mc_jax.errors import ConfigError
from mc_jax.evaluation.recall import Rows
from mc_jax.evaluation.subject import Options, Result, Subject
from mc_jax.memory.caching import Cached, Reads
from mc_jax.models import ModelConfig, inspection
from mc_jax.models.config import with_memories
from mc_jax.parallel import axes


def problem(model: ModelConfig) -> str | None:
  """Why such a model has no gates to measure, or None."""
  options = model.memory.as_read()
  if not model.has_memories:
    return (
      f"it needs gates, which model.pattern={','.join(model.pattern)} does not have: use a model.pattern with "
      f"{with_memories()}"
    )
  if not memory.aggregate.scored(options.aggregation, options.gate):
    return (
      "it needs gates that depend on the token: model.memory.aggregation must be ssc, or grm or soup with "
      "model.memory.gate one of softmax, sigmoid, token; this model reads with "
      f"aggregation={options.aggregation}, gate={options.gate}"
    )
  return None


def reads(name: str, rows: Rows) -> Callable[[Subject, Options], Iterator[Result]]:
  """The task `name`: gamma of every memory, averaged over answer tokens, in each setting of a recall task.

  A result's `reads` has an entry for each memory that holds an answer: {"memory": its number, "tokens": the number of
  answer tokens, "gamma": [layers, heads, 1 + caches] means over them}. Its values are means over all answer tokens:

  * gamma_right: gamma of the memory that holds the answer, averaged over layers and heads.
  * best_head: the same for the layer and head where it is largest.
  * even: the value if all visible memories had equal shares.
  * tokens: the number of answer tokens that occur earlier in their row.

  It raises ConfigError if `problem` returns a reason, or if no row contains its own answer.
  """

  def run(subject: Subject, options: Options) -> Iterator[Result]:
    model = nnx.merge(subject.graph, subject.params).config
    if why := problem(model):
      raise ConfigError(f"{name}: {why}")
    for settings, data, batches in rows(subject, options):
      segment = memory.segments.index(model.memory.build_segmentation().lengths(data.length))
      holders = [holder(batch, segment) for batch in batches]
      if not any((h >= 0).any() for h in holders):
        raise ConfigError(
          f"{name}: with data.tokenizer={data.tokenizer} no row contains its answer in the form that it is queried in"
        )
      gamma = _sums(subject, data, batches, holders, int(segment[-1]) + 1)
      held = np.concatenate([h[h >= 0] for h in holders])
      visible = np.concatenate([np.broadcast_to(segment + 1, h.shape)[h >= 0] for h in holders])
      yield _result(name, settings, gamma, np.bincount(held, minlength=len(gamma)), np.mean(1 / visible))

  return run


def holder(batch: Batch, segment: np.ndarray) -> np.ndarray:
  """The number of the memory that holds each token's answer, int32 [batch, length]; -1 at tokens that are no answer.

  It is the online memory if the answer is in the token's own segment.

  Args:
    batch: A batch of a recall task.
    segment: The segment of every token, [length].
  """
  place = places(batch)
  return np.where(place < 0, -1, np.where(segment[place] == segment, 0, 1 + segment[place])).astype(np.int32)


def places(batch: Batch) -> np.ndarray:
  """The earlier position of each answer token in its row, int [batch, length]; -1 if there is none.

  Answers are runs of targets with weight. If an answer occurs several times, its first occurrence is taken.
  """
  positions = np.full(batch["tokens"].shape, -1)
  for tokens, targets, weights, place in zip(*map(batch.get, ("tokens", "targets", "weights")), positions, strict=True):
    asked = np.flatnonzero(weights)
    for answer in np.split(asked, np.flatnonzero(np.diff(asked) > 1) + 1):
      if 0 < len(answer) <= answer[0] + 1:
        before = np.lib.stride_tricks.sliding_window_view(tokens[: answer[0] + 1], len(answer))
        if (starts := np.flatnonzero((before == targets[answer]).all(1))).size:
          place[answer] = starts[0] + np.arange(len(answer))
  return positions


def of_memories(read: Reads) -> jax.Array:
  """gamma of the online memory and of every cache, [b, h, length, 1 + n]; 0 for caches that are not read."""
  cached = read.cached
  if read.index is not None:  # for the selected caches only
    # A comparison, not a product: a TPU would round gamma, and store [b, h, length, k, n].
    chosen = read.index[..., None] == jnp.arange(read.visible.shape[-1])
    cached = jnp.where(chosen, cached[..., None], 0.0).sum(-2)
  return jnp.concatenate([read.online[..., None], cached], axis=-1)


def _sums(
  subject: Subject, data: DataConfig, batches: list[Batch], holders: list[np.ndarray], memories: int
) -> np.ndarray:
  """gamma summed over answer tokens by the memory that holds the answer: [memories, layers, heads, memories]."""
  shapes = windows.shapes(data, subject.mesh)
  shapes["holder"] = shapes["tokens"]

  def look(params: dict, batch: dict[str, jax.Array]) -> jax.Array:
    held = jax.nn.one_hot(batch["holder"], memories)  # all 0 for -1

    def sums(cached: Cached) -> jax.Array:
      return jnp.einsum("blt,bhlr->thr", held, of_memories(cached.reads), precision=jax.lax.Precision.HIGHEST)

    return inspection.look(nnx.merge(subject.graph, params), batch["tokens"], batch.get("segment_ids"), sums)

  jitted = jax.jit(look, out_shardings=axes.sharding(subject.mesh, ()))
  with jax.set_mesh(subject.mesh):
    summed = [
      jitted(subject.params, windows.place({**batch, "holder": held}, shapes))
      for batch, held in zip(batches, holders, strict=True)
    ]
  return np.moveaxis(np.sum(jax.device_get(summed), axis=0, dtype=np.float64), 0, 1)


def _result(name: str, settings: dict[str, int], gamma: np.ndarray, tokens: np.ndarray, even: float) -> Result:
  right = np.einsum("tlht->lh", gamma) / tokens.sum()
  values = {"gamma_right": right.mean(), "best_head": right.max(), "even": even}
  rows = ({"memory": i, "tokens": int(n), "gamma": gamma[i] / n} for i, n in enumerate(tokens) if n)
  return Result(
    name,
    settings,
    {**{key: float(value) for key, value in values.items()}, "tokens": int(tokens.sum())},
    reads=tuple({**row, "gamma": row["gamma"].round(4).tolist()} for row in rows),
  )
