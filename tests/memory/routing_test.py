"""Pools, scores and gates: on their own, and each kind of gate against the reference."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples
from marks import slow

from mc_jax.memory import documents, routing, rules, segments

SEGMENT_IDS = np.array([[1] * 7 + [0] + [2] * 4, [3] * 12])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
  ("gate", "aggregation", "carry", "segment_ids"),
  [
    ("token", "grm", "checkpoint", SEGMENT_IDS),
    slow("token", "soup", "independent", None),
    slow("token", "ssc", "checkpoint", SEGMENT_IDS),
    ("constant", "ssc", "independent", SEGMENT_IDS),
    slow("constant", "soup", "checkpoint", None),
    ("uniform", "soup", "checkpoint", SEGMENT_IDS),
    slow("uniform", "ssc", "independent", SEGMENT_IDS),
  ],
)
def test_every_gate_weighs_as_the_reference_does(gate, aggregation, carry, segment_ids):
  rule = rules.get("swla", chunk=2)
  x = samples.inputs(rule, batch=2, length=12, ages=5 if gate == "token" else None)
  options = dict(rule=rule, aggregation=aggregation, carry=carry, gate=gate, segmentation=segments.constant(4))
  samples.assert_equals_reference(x, segment_ids, gate_scale=0.7, pool="sum", top_k=1, **options)


@pytest.mark.usefixtures("float64")
def test_token_scores_at_padding_do_not_matter():
  rule = rules.get("linear", chunk=2)
  x = samples.inputs(rule, batch=2, length=12, ages=3)
  cotangent = samples.like(x.q)
  options = dict(rule=rule, aggregation="grm", gate="token", segmentation=segments.constant(4))
  run = samples.forward_and_back(**options)
  padded = samples.select(SEGMENT_IDS != 0, x, np.nan)
  chex.assert_trees_all_equal(run(padded, SEGMENT_IDS, cotangent), run(x, SEGMENT_IDS, cotangent))


weigh = samples.numpy(samples.jit(routing.weigh, static_argnums=0))
select = samples.numpy(samples.jit(routing.select, static_argnums=2))
pool_keys = samples.numpy(samples.jit(routing.pool_keys))


def test_gates_weigh_what_is_visible():
  rng = np.random.default_rng(0)
  online, cached = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 5), (2, 3, 5, 4)))
  visible = rng.random((2, 1, 5, 4)) < 0.5
  visible[0, :, 0] = False
  everywhere = np.broadcast_to(visible, cached.shape)

  gamma_online, gamma = weigh("softmax", 2.0, online, cached, visible)
  chex.assert_trees_all_equal(gamma[~everywhere], np.zeros((~everywhere).sum(), np.float32))
  chex.assert_trees_all_close(gamma_online + gamma.sum(-1), np.ones_like(gamma_online), rtol=1e-6)
  ratios = np.where(everywhere, np.exp(2 * (cached - online[..., None])), 0)
  chex.assert_trees_all_close(gamma / gamma_online[..., None], ratios.astype(np.float32), rtol=1e-4)
  chex.assert_trees_all_equal(weigh("token", 2.0, online, cached, visible)[1], gamma)

  gamma_online, gamma = weigh("sigmoid", 2.0, online, cached, visible)
  chex.assert_trees_all_close(gamma_online, np.float32(1 / (1 + np.exp(-2 * online))), rtol=1e-5)
  chex.assert_trees_all_close(gamma, np.float32(everywhere / (1 + np.exp(-2 * cached))), rtol=1e-5)

  gamma_online, gamma = weigh("constant", 2.0, online, cached, visible)
  chex.assert_trees_all_equal((gamma_online, gamma), (np.ones((2, 3, 5), np.float32), np.float32(everywhere)))

  gamma_online, gamma = weigh("uniform", 2.0, online, cached, visible)
  chex.assert_trees_all_close(gamma_online, np.float32(1 / (1 + everywhere.sum(-1))), rtol=1e-6)
  chex.assert_trees_all_close(gamma, np.float32(everywhere * gamma_online[..., None]), rtol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_large_scores_leave_gates_and_their_gradients_finite(kind):
  online, cached = np.float32([-3e4, 3e4]), np.float32([[3e4, -3e4], [-3e4, 3e4]])

  def value(online, cached):
    gamma = routing.weigh(kind, 2.0, online, cached, jnp.array([True, False]))
    return gamma[0].sum() + gamma[1].sum(), gamma[1]

  (_, gamma), gradient = samples.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(online, cached)
  chex.assert_tree_all_finite(gradient)
  chex.assert_trees_all_close(gamma, np.float32([[1, 0], [0, 0]]))


@pytest.mark.parametrize("top_k", [1, 2, 9])
def test_the_best_visible_caches_are_selected(top_k):
  rng = np.random.default_rng(1)
  cached = rng.normal(size=(2, 3, 6, 5)).astype(np.float32)
  visible = np.arange(6)[:, None] > np.arange(5)  # the first token sees none, the last all
  index, scores, kept = select(cached, visible, top_k)
  chex.assert_shape((index, scores, kept), (2, 3, 6, min(top_k, 5)))
  for b, h, t in np.ndindex(2, 3, 6):
    order = sorted(range(t), key=lambda i, x=cached[b, h, t]: -x[i])[:top_k]
    assert list(index[b, h, t][kept[b, h, t]]) == order
    chex.assert_trees_all_equal(scores[b, h, t][: len(order)], cached[b, h, t][order])
  chex.assert_tree_all_finite(scores)


def test_pools_hold_the_documents_keys_up_to_and_including_each_token():
  rng = np.random.default_rng(2)
  ids = np.array([[1, 1, 2, 0, 3, 3], [1, 1, 1, 1, 1, 1]])
  k = rng.normal(size=(2, 3, 6, 4)).astype(np.float32) * (ids > 0)[:, None, :, None]
  seen = samples.jit(lambda ids: documents.visible(jax.tree.map(lambda x: x[:, None], documents.index(ids)), 6))(ids)
  before = routing.Pool(np.full((2, 3, 4), 7, np.float32), np.full((2, 3, 1), 2, np.float32))  # of another document
  after, so_far = pool_keys(before, k, seen)
  for row, t in np.ndindex(2, 6):
    number = max(ids[row, : t + 1]) if ids[row, t] == 0 else ids[row, t]
    own = [j for j in range(t + 1) if ids[row, j] == number]
    chex.assert_trees_all_close(so_far.total[row, :, t], k[row, :, own].sum(0), atol=1e-6)
    chex.assert_trees_all_equal(so_far.count[row, :, t], np.full((3, 1), len(own), np.float32))
  chex.assert_trees_all_equal(after, jax.tree.map(lambda x: x[:, :, 5], so_far))
  mean, total = routing.summary(so_far, "mean"), routing.summary(so_far, "sum")
  chex.assert_trees_all_close(mean * so_far.count, total, rtol=1e-6)
  chex.assert_trees_all_equal(routing.summary(routing.empty_pool(k), "mean"), np.zeros((2, 3, 4), np.float32))


def test_an_open_pool_goes_on():
  rng = np.random.default_rng(3)
  k = rng.normal(size=(1, 2, 6, 4)).astype(np.float32)
  whole, _ = pool_keys(routing.empty_pool(k), k, documents.visible(None, 6))
  half, _ = pool_keys(routing.empty_pool(k), k[:, :, :3], documents.visible(None, 3))
  end, _ = pool_keys(half, k[:, :, 3:], documents.visible(None, 3))
  chex.assert_trees_all_close(end, whole, rtol=1e-5)
  assert whole.count.tolist() == [[[6.0], [6.0]]]


def test_scores_of_tokens_are_looked_up_by_age():
  scores = np.random.default_rng(4).normal(size=(2, 3, 7, 5)).astype(np.float32)
  segment = segments.index((3, 3, 1))
  online, cached = samples.numpy(samples.jit(routing.scores_by_age))(scores, segment[:, None] - np.arange(2))
  chex.assert_trees_all_equal(online, scores[..., 0])
  for t in range(7):
    for i in range(segment[t]):
      chex.assert_trees_all_equal(cached[:, :, t, i], scores[:, :, t, segment[t] - i])
