"""Measures how many values of memory layers a run's validation rows read: those that nobody reads are capacity lost."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

from mc_jax.data import windows
from mc_jax.errors import ConfigError
from mc_jax.evaluation.subject import Options, Result, Subject
from mc_jax.models import ModelConfig, inspection, layer
from mc_jax.models.layer import FeedForward
from mc_jax.parallel import axes

_POINTS = 200  # of the curve of shares


def problem(model: ModelConfig) -> str | None:
  """Why such a model has no values to be read, or None."""
  if model.has_values:
    return None
  able = " or ".join(name for name in layer.names(FeedForward) if layer.LAYERS[name].has_values)
  return f"it needs memory layers: a model.feed_forward with {able}, got {','.join(model.feed_forward)}"


def run(subject: Subject, options: Options) -> Iterator[Result]:
  """A result for each memory layer, of the validation rows of all sources, at the run's own length.

  * used: The share of values that a token of these rows read.
  * kl: Kullback-Leibler divergence in nats of the values' shares of weight from equal shares: 0 if all are read alike,
    log(values) if one is read alone.

  A result's `usage` has the shares in descending order, {"row": rank from 1, "share": of the weight} at some 200 ranks.

  Raises:
    ConfigError: `problem` returns a reason.
  """
  model = nnx.merge(subject.graph, subject.params).config
  if why := problem(model):
    raise ConfigError(f"usage: {why}")
  del options
  data = subject.data
  shapes = windows.shapes(data, subject.mesh)

  def masses(params: dict, batch: windows.Batch) -> jax.Array:
    return inspection.values_read(nnx.merge(subject.graph, params), batch["tokens"], batch.get("segment_ids"))

  jitted = jax.jit(masses, out_shardings=axes.sharding(subject.mesh, ()))
  total = 0.0
  with jax.set_mesh(subject.mesh):
    for part in subject.load(data, "usage").validation.values():
      for batch in part.batches:
        total = total + np.asarray(jitted(subject.params, windows.place(batch, shapes)), np.float64)
  for number, mass in zip(_numbers(model), total, strict=True):
    used, divergence = (float(x) for x in inspection.spread(mass))
    shares = np.sort(mass)[::-1] / mass.sum()
    ranks = np.unique(np.geomspace(1, len(shares), _POINTS).astype(int))
    curve = tuple({"row": int(rank), "share": float(shares[rank - 1])} for rank in ranks)
    yield Result("usage", {"layer": number, "values": len(mass)}, {"used": used, "kl": divergence}, usage=curve)


def _numbers(model: ModelConfig) -> list[int]:
  """The blocks that have memory layers, from 0, in their order."""
  kinds = model.feed_forwards
  return [i for i in range(model.layers) if kinds[i % model.period].has_values]
