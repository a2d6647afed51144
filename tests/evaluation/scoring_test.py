"""Losses and right answers are those of the logits, on one device and on several."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from mc_jax.data import datasets
from mc_jax.evaluation import scoring
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.training import state


def test_losses_and_right_answers(tiny, alone):
  config = tiny(pattern="attention")
  graph, params = state.graph(config), state.create(config, alone).params
  (part,) = datasets.load(config.data).validation.values()
  scored = scoring.scorer(graph, config.data, alone)(params, part.batches)
  assert len(scored) == len(part.batches)
  forward = jax.jit(lambda tokens: nnx.merge(graph, params)(tokens))
  for s, batch in zip(scored, part.batches, strict=True):
    logits = np.asarray(forward(batch["tokens"]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    chex.assert_trees_all_close(s.loss, np.float32(expected), rtol=1e-4)
    chex.assert_trees_all_equal(s.right, logits.argmax(-1) == batch["targets"])
  total = sum((s.loss * s.batch["weights"]).sum() for s in scored) / np.log(2)
  assert scoring.bits(scored) == pytest.approx(total, rel=1e-5)


def test_documents_are_kept_apart_where_the_run_does(tiny, alone):
  plain, apart = tiny(pattern="attention"), tiny(pattern="attention", documents=True)
  params, graph = state.create(plain, alone).params, state.graph(plain)
  (batch,) = datasets.load(apart.data).validation["text"].batches[:1]
  batch = batch | {"segment_ids": np.repeat([[1, 2]], 8, axis=1).repeat(4, axis=0).astype(np.int32)}
  one, two = (scoring.scorer(graph, c.data, alone)(params, [batch])[0].loss for c in (plain, apart))
  chex.assert_trees_all_close(one[:, :8], two[:, :8], rtol=1e-5)
  assert not np.allclose(one[:, 8:], two[:, 8:], rtol=1e-3)


def test_a_mesh_scores_the_same(tiny, alone):
  config = dataclasses.replace(tiny(pattern="attention"), mesh=MeshConfig(data=2, model=2))
  mesh = config.make_mesh(jax.devices()[:4])
  (part,) = datasets.load(config.data).validation.values()
  first, second = (
    scoring.scorer(state.graph(config), config.data, on)(state.create(config, on).params, part.batches)
    for on in (alone, mesh)
  )
  chex.assert_trees_all_close([s.loss for s in first], [s.loss for s in second], rtol=1e-5)
