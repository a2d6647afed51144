"""Batches are windows of the text, the same ones for the same seed and step."""

import functools
import itertools

import chex
import jax
import numpy as np
import pytest

from mc_jax.data import DataConfig, loader, streams, tokenizers, windows
from mc_jax.errors import ConfigError
from mc_jax.parallel import mesh as meshes

STREAM = np.random.default_rng(0).integers(1, 256, 1000).astype(np.uint8)


def _config(**fields):
  return DataConfig(**{"length": 16, "batch_size": 4, "seed": 3} | fields)


def _batches(stream, config, mesh=None):
  mesh = mesh or meshes.make(meshes.MeshConfig(), jax.devices()[:1])
  rows = functools.partial(streams.windows, windows.training(stream, config), config.virtual_shards)
  return loader.Batches(rows, config.virtual_shards, windows.shapes(config, mesh))


def test_targets_are_the_tokens_that_follow():
  batch = next(_batches(STREAM, _config()))
  chex.assert_shape([batch["tokens"], batch["targets"], batch["weights"]], (4, 16))
  assert set(batch) == {"tokens", "targets", "weights"}
  np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
  assert (batch["weights"] == 1).all()
  for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
    row = bytes(tokens.astype(np.uint8)) + bytes([targets[-1]])
    assert row in STREAM.tobytes()


def test_batches_depend_on_seed_and_step_alone():
  first, second = (list(itertools.islice(_batches(STREAM, _config()), 40)) for _ in "ab")
  chex.assert_trees_all_equal(first, second)
  other = next(_batches(STREAM, _config(seed=4)))
  assert (other["tokens"] != first[0]["tokens"]).any()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_of_any_size(batch_size):
  batch = next(_batches(STREAM, _config(batch_size=batch_size)))
  chex.assert_shape(batch["tokens"], (batch_size, 16))


@pytest.mark.parametrize("step", [0, 3, 40])
def test_a_restored_iterator_goes_on_where_the_saved_one_was(step):
  iterator = _batches(STREAM, _config())
  for _ in range(step):
    next(iterator)
  saved = iterator.state()
  expected = [next(iterator) for _ in range(3)]
  restored = _batches(STREAM, _config())
  restored.restore(saved)
  chex.assert_trees_all_equal([next(restored) for _ in range(3)], expected)


def test_epochs_cover_the_text_in_different_orders():
  stream = np.arange(1, 161, dtype=np.uint8)  # a token is its own place
  iterator = _batches(stream, _config(batch_size=10))
  first, second = (np.sort(next(iterator)["tokens"][:, 0].astype(int)) for _ in range(2))
  for starts in (first, second):  # one window in each stretch of 16, the last pushed back
    np.testing.assert_array_equal((starts[:-1] - 1) // 16, np.arange(9))
  assert (first != second).any()


def test_a_batch_may_be_one_row_of_one_token():
  batch = next(_batches(STREAM, _config(batch_size=1, length=1)))
  chex.assert_shape(batch["tokens"], (1, 1))


def test_a_text_shorter_than_a_row_is_an_error():
  windows.training(STREAM[:17], _config())
  with pytest.raises(ConfigError, match=r"data\.length=16 .* must be at most 15"):
    windows.training(STREAM[:16], _config())


def test_validation_scores_every_token_but_the_first_once():
  batches = windows.validation(STREAM, _config(validation_tokens=0))
  scored = np.concatenate([batch["targets"][batch["weights"] == 1] for batch in batches])
  np.testing.assert_array_equal(scored, STREAM[1:])
  assert all(batch["tokens"].shape == (4, 16) for batch in batches)


def test_capped_validation_is_spread_over_the_text():
  stream = (np.arange(1600) // 16).astype(np.uint8)  # a token is the number of its window
  batches = windows.validation(stream, _config(validation_tokens=10 * 16))
  starts = np.concatenate([batch["tokens"][:, 0] for batch in batches])[:10]
  np.testing.assert_array_equal(starts, np.arange(0, 100, 10))
  assert sum(batch["weights"].sum() for batch in batches) == 160


def test_documents_are_numbered_from_the_separators():
  stream = np.full(100, 65, np.uint8)
  stream[[0, 5, 12, 70]] = tokenizers.SEPARATOR
  batch = windows.validation(stream, _config(documents=True))[0]
  np.testing.assert_array_equal(batch["segment_ids"][0], [2] * 5 + [3] * 7 + [4] * 4)
  np.testing.assert_array_equal(batch["segment_ids"][1], [1] * 16)
  last = windows.validation(stream, _config(documents=True))[1]
  np.testing.assert_array_equal(last["segment_ids"] > 0, last["weights"] > 0)


@pytest.mark.parametrize("documents", [False, True])
def test_shapes_are_those_of_every_batch(documents):
  config = _config(documents=documents)
  for batch in (next(_batches(STREAM, config)), *windows.validation(STREAM, config)):
    chex.assert_trees_all_equal_shapes_and_dtypes(
      batch,
      {
        name: np.zeros(spec.shape, spec.dtype)
        for name, spec in windows.shapes(config, meshes.make(meshes.MeshConfig(), jax.devices()[:1])).items()
      },
    )
