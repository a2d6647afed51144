"""Scores batches token by token."""

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
  """A scored batch; all arrays are [batch, length].

  Attributes:
    batch: The batch, see data/windows.py.
    loss: -log p(target) in nats, float32, also of targets without weight.
    right: Whether the target is the likeliest token.
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
  """(params, batches) -> the scored batches, in every process. Compiled at the first call.

  Args:
    graph: The model's graph: `nnx.merge(graph, params)` is the model.
    config: The data's configuration: the batches' shape, and whether documents are separate.
    mesh: The parameters' mesh.
  """
  shapes = windows.shapes(config, mesh)

  def step(params: dict, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    logits = nnx.merge(graph, params)(batch["tokens"], batch.get("segment_ids"))
    return losses(logits, batch["targets"]), logits.argmax(-1) == batch["targets"]

  jitted = jax.jit(step, out_shardings=axes.sharding(mesh, ()))

  def score(params: dict, batches: Iterable[Batch]) -> list[Scored]:
    with jax.set_mesh(mesh):
      scores = [(batch, jitted(params, windows.place(batch, shapes))) for batch in batches]
    return [Scored(batch, *jax.device_get(arrays)) for batch, arrays in scores]

  return score


def bits(scored: Iterable[Scored]) -> float:
  """The weighted sum of -log2 p(target)."""
  return sum(float(np.sum(s.loss * s.batch["weights"], dtype=np.float64)) for s in scored) / math.log(2)
