"""What a model makes of batches, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mc_jax.data import DataConfig, windows
from mc_jax.data.windows import Batch
from mc_jax.parallel import axes


class Scored(NamedTuple):
  """A batch, [batch, length] arrays all of them.

  Attributes:
    batch: as of data/windows.py.
    loss: -log p(target) in nats, float32, wherever the target; see batch["weights"] for those that count.
    right: whether the target is the likeliest token.
  """

  batch: Batch
  loss: np.ndarray
  right: np.ndarray


def losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """-log p(target) in nats, float32: logits [batch, length, vocab], targets [batch, length] to [batch, length]."""
  return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def scorer(
  graph: nnx.GraphDef, config: DataConfig, mesh: jax.sharding.Mesh
) -> Callable[[dict, Iterable[Batch]], list[Scored]]:
  """(params, batches) -> the batches, scored: every process has all of them. Compiled at the first call.

  Args:
    graph: of the model: `nnx.merge(graph, params)` is one.
    config: of the batches: their shape, and whether documents are kept apart.
    mesh: that the parameters lie on.
  """
  shapes = windows.shapes(config, mesh)

  def step(params: dict, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    logits = nnx.merge(graph, params)(batch["tokens"], batch.get("segment_ids"))
    return losses(logits, batch["targets"]), logits.argmax(-1) == batch["targets"]

  jitted = jax.jit(step, out_shardings=axes.sharding(mesh, ()))

  def score(params: dict, batches: Iterable[Batch]) -> list[Scored]:
    with jax.set_mesh(mesh):
      found = [(batch, jitted(params, windows.place(batch, shapes))) for batch in batches]
    return [Scored(batch, *jax.device_get(scores)) for batch, scores in found]

  return score


def bits(scored: Iterable[Scored]) -> float:
  """Sum of -log2 p(target) over the targets that count."""
  return sum(float(np.sum(s.loss * s.batch["weights"], dtype=np.float64)) for s in scored) / math.log(2)
