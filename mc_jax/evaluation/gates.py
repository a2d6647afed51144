"""Gates looked at: which memories does each answer token read, and which one holds its answer?

A memory's number is 0 for the online one, 1 + i for the cache of segment i.
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
  """Why there is nothing to be seen in such a model, or None."""
  options = model.memory.as_read()
  if not model.has_memories:
    return (
      f"it needs gates, which model.pattern={','.join(model.pattern)} does not have: use a model.pattern with "
      f"{with_memories()}"
    )
  if not memory.aggregate.scored(options.aggregation, options.gate):
    return (
      "it needs memories that are told apart: model.memory.aggregation must be ssc, or grm or soup with "
      "model.memory.gate one of softmax, sigmoid, token; this model reads with "
      f"aggregation={options.aggregation}, gate={options.gate}"
    )
  return None


def reads(name: str, rows: Rows) -> Callable[[Subject, Options], Iterator[Result]]:
  """The task `name`: gamma of every memory, averaged over answer tokens, in each setting of a recall task.

  A result's `reads` has, for each memory that holds an answer, {"memory": its number, "tokens": answer tokens,
  "gamma": [layers, heads, 1 + caches] means over these}. Its values are means over all answer tokens:

  * gamma_right: of the memory that holds the answer, the mean over layers and heads; best_head: of the layer and head
    where it is the largest; even: what equal shares of all visible memories would give.
  * tokens: answer tokens that were found in their row.

  It raises ConfigError where `problem` has an answer, or where no row holds its own answer.
  """

  def run(subject: Subject, options: Options) -> Iterator[Result]:
    model = nnx.merge(subject.graph, subject.params).config
    if why := problem(model):
      raise ConfigError(f"{name}: {why}")
    for settings, data, batches in rows(subject, options):
      segment = memory.segments.index(model.memory.build_segmentation().lengths(data.length))
      holders = [holder(batch, segment) for batch in batches]
      if not any((held >= 0).any() for held in holders):
        raise ConfigError(f"{name}: with data.tokenizer={data.tokenizer} no row holds its answer as it is asked for")
      gamma = _sums(subject, data, batches, holders, int(segment[-1]) + 1)
      found = np.concatenate([h[h >= 0] for h in holders])
      visible = np.concatenate([np.broadcast_to(segment + 1, h.shape)[h >= 0] for h in holders])
      yield _result(name, settings, gamma, np.bincount(found, minlength=len(gamma)), np.mean(1 / visible))

  return run


def holder(batch: Batch, segment: np.ndarray) -> np.ndarray:
  """The number of the memory that holds the answer of each token, int32 [batch, length]; -1 where none is asked for.

  It is the online one where the answer stands in the token's own segment.

  Args:
    batch: of a recall task.
    segment: of every token, [length].
  """
  place = places(batch)
  return np.where(place < 0, -1, np.where(segment[place] == segment, 0, 1 + segment[place])).astype(np.int32)


def places(batch: Batch) -> np.ndarray:
  """Where each answer token stands in its row, before it is asked for: int [batch, length], -1 where it does not.

  Answers are runs of targets that count. Where one stands several times, it is the first time that counts.
  """
  found = np.full(batch["tokens"].shape, -1)
  for tokens, targets, weights, place in zip(*map(batch.get, ("tokens", "targets", "weights")), found, strict=True):
    asked = np.flatnonzero(weights)
    for answer in np.split(asked, np.flatnonzero(np.diff(asked) > 1) + 1):
      if 0 < len(answer) <= answer[0] + 1:
        before = np.lib.stride_tricks.sliding_window_view(tokens[: answer[0] + 1], len(answer))
        if (starts := np.flatnonzero((before == targets[answer]).all(1))).size:
          place[answer] = starts[0] + np.arange(len(answer))
  return found


def of_memories(read: Reads) -> jax.Array:
  """gamma of the online memory and of every cache, [b, h, length, 1 + n]; 0 of those that are not read."""
  cached = read.cached
  if read.index is not None:  # of the selected ones
    # Compared, not multiplied: a TPU would round a product's gamma, and keep its [b, h, length, k, n].
    chosen = read.index[..., None] == jnp.arange(read.visible.shape[-1])
    cached = jnp.where(chosen, cached[..., None], 0.0).sum(-2)
  return jnp.concatenate([read.online[..., None], cached], axis=-1)


def _sums(
  subject: Subject, data: DataConfig, batches: list[Batch], holders: list[np.ndarray], memories: int
) -> np.ndarray:
  """gamma, added up over answer tokens by the memory that holds the answer: [memories, layers, heads, memories]."""
  shapes = windows.shapes(data, subject.mesh)
  shapes["holder"] = shapes["tokens"]

  def look(params: dict, batch: dict[str, jax.Array]) -> jax.Array:
    held = jax.nn.one_hot(batch["holder"], memories)  # all 0 of -1

    def tell(cached: Cached) -> jax.Array:
      return jnp.einsum("blt,bhlr->thr", held, of_memories(cached.reads), precision=jax.lax.Precision.HIGHEST)

    return inspection.look(nnx.merge(subject.graph, params), batch["tokens"], batch.get("segment_ids"), tell)

  jitted = jax.jit(look, out_shardings=axes.sharding(subject.mesh, ()))
  with jax.set_mesh(subject.mesh):
    found = [
      jitted(subject.params, windows.place({**batch, "holder": held}, shapes))
      for batch, held in zip(batches, holders, strict=True)
    ]
  return np.moveaxis(np.sum(jax.device_get(found), axis=0, dtype=np.float64), 0, 1)


def _result(name: str, settings: dict[str, int], gamma: np.ndarray, tokens: np.ndarray, even: float) -> Result:
  right = np.einsum("tlht->lh", gamma) / tokens.sum()
  values = {"gamma_right": right.mean(), "best_head": right.max(), "even": even}
  found = ({"memory": i, "tokens": int(n), "gamma": gamma[i] / n} for i, n in enumerate(tokens) if n)
  return Result(
    name,
    settings,
    {**{key: float(value) for key, value in values.items()}, "tokens": int(tokens.sum())},
    reads=tuple({**row, "gamma": row["gamma"].round(4).tolist()} for row in found),
  )
