"""Which tokens may know of each other; rows of one document against rows without marks."""

import chex
import jax
import numpy as np
import pytest
import samples

from mc_jax.memory import documents, rules, segments


def test_documents_are_runs_of_one_nonzero_id():
  ids = np.concatenate([samples.SEGMENT_IDS, np.random.default_rng(0).integers(0, 3, (20, samples.LENGTH))])
  numbers = samples.document_numbers(ids)
  found = jax.device_get(jax.jit(documents.index)(ids))
  chex.assert_trees_all_equal(found.valid, ids != 0)
  chex.assert_trees_all_equal(np.where(ids != 0, found.number, 0), numbers)
  # Padding carries the number on, so that what came before it is not thought to have ended twice.
  chex.assert_trees_all_equal(found.number, np.maximum.accumulate(numbers, axis=1).astype(np.int32))
  chex.assert_trees_all_equal(found.before, np.pad(found.number, [(0, 0), (1, 0)])[:, :-1])


@pytest.mark.parametrize("window", [1, 3])
def test_tokens_see_their_own_documents_tokens_and_windows_reach_back(window):
  ids = np.array([[1, 1, 2, 0, 3, 3, 3, 0]])
  before, chunk = 4, slice(4, 8)  # the chunk's first token starts a document; then again from token 1 on
  found = jax.tree.map(lambda x: x[..., chunk], jax.jit(documents.index)(ids))
  seen = documents.visible(found, before, window)
  own = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]], bool)[None]
  earlier = np.zeros((1, 4, window - 1), bool)
  chex.assert_trees_all_equal(np.asarray(seen.same), own)
  chex.assert_trees_all_equal(np.asarray(seen.reach), np.concatenate([own, earlier], -1))
  chex.assert_trees_all_equal(np.asarray(seen.last), np.asarray(seen.reach[:, -1:]))
  chex.assert_trees_all_equal(np.asarray(seen.incoming), np.zeros((1, 4, 1), bool))
  # The window's earlier keys are of the document that came in.
  came_in = np.array([False] * 4 + [True] * (window - 1))[None, :, None]
  chex.assert_trees_all_equal(np.asarray(seen.keys_incoming), came_in)
  chex.assert_trees_all_equal(np.asarray(seen.continues), np.zeros((1, 1, 1), bool))

  found = jax.tree.map(lambda x: x[..., 1:5], jax.jit(documents.index)(ids))
  seen = documents.visible(found, 4, window)
  incoming = np.array([True, False, False, False])[None, :, None]
  chex.assert_trees_all_equal(np.asarray(seen.incoming), incoming)
  chex.assert_trees_all_equal(np.asarray(seen.keys_incoming)[:, :4], incoming)
  # Token 3 is padding: nobody sees it, and it sees the document that it follows.
  own = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], bool)[None]
  chex.assert_trees_all_equal(np.asarray(seen.same), own)
  earlier = np.repeat(incoming, window - 1, axis=-1)
  chex.assert_trees_all_equal(np.asarray(seen.reach), np.concatenate([own, earlier], -1))
  chex.assert_trees_all_equal(np.asarray(seen.last), np.asarray(seen.reach[:, -1:]))
  chex.assert_trees_all_equal(np.asarray(seen.continues), np.zeros((1, 1, 1), bool))

  found = jax.tree.map(lambda x: x[..., 5:8], jax.jit(documents.index)(ids))
  seen = documents.visible(found, 3, window)  # a document that goes on to the chunk's end, and padding there
  chex.assert_trees_all_equal(np.asarray(seen.continues), np.ones((1, 1, 1), bool))
  assert np.asarray(seen.last)[0, 0].tolist() == [True, True, False] + [True] * (window - 1)


def test_without_documents_everything_earlier_is_seen():
  seen = documents.visible(None, 5, 3)
  chex.assert_trees_all_equal(np.asarray(seen.same), np.tri(5, dtype=bool))
  chex.assert_trees_all_equal(np.asarray(seen.reach), np.concatenate([np.tri(5, dtype=bool), np.ones((5, 2), bool)], 1))
  chex.assert_trees_all_equal(np.asarray(seen.last), np.ones((1, 7), bool))
  assert seen.incoming is seen.keys_incoming is seen.continues is None


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
  ("rule", "aggregation", "carry"),
  [
    (rules.get("swla", chunk=2, window=3), "soup", "checkpoint"),
    (rules.get("titans", chunk=2, expansion=2), "grm", "checkpoint"),
    (rules.get("linear", chunk=2), "ssc", "independent"),
  ],
  ids=lambda x: getattr(x, "name", x),
)
def test_a_row_of_one_document_is_a_row_without_marks(rule, aggregation, carry):
  """So a packed document that starts on a boundary gets what it gets alone (caching_test.py) and without marks."""
  x = samples.inputs(rule, batch=2, length=8, heads=1)
  run = samples.forward(rule=rule, aggregation=aggregation, carry=carry, segmentation=segments.constant(2), top_k=1)
  chex.assert_trees_all_close(run(x, np.full((2, 8), 7)), run(x), rtol=1e-9, atol=1e-9)
