"""The order of documents: every one once an epoch, a function of the seed."""

import numpy as np
import pytest

from mc_jax.data.documents import Order, chance, permuted


@pytest.mark.parametrize("scattered", [False, True])
def test_an_epoch_has_every_document_once(scattered):
  order = Order([3, 1, 20, 7, 7, 2, 60], 5, scattered)
  first, second = ([order[i] for i in range(epoch * 100, epoch * 100 + 100)] for epoch in (0, 1))
  assert sorted(first) == sorted(second) == list(range(100))
  assert first != second
  assert first != list(range(100))
  again = Order([3, 1, 20, 7, 7, 2, 60], 5, scattered)
  assert [again[i] for i in range(99, -1, -1)] == first[::-1]
  other = Order([3, 1, 20, 7, 7, 2, 60], 6, scattered)
  assert [other[i] for i in range(100)] != first


def test_what_is_read_together_is_used_together():
  """Of blocks of 10, at most 4 are open at any time."""
  order = Order([10] * 50, 0, scattered=False)
  numbers = np.array([order[i] for i in range(480)]).reshape(-1, 40) // 10
  assert all(len(np.unique(group)) <= 4 for group in numbers)
  assert len(np.unique(numbers[0, :10])) > 1


def test_a_large_permutation_is_one():
  size = 100_003
  seen = {permuted(i, size, (0, 1)) for i in range(size)}
  assert seen == set(range(size))
  assert [permuted(i, size, (0, 1)) for i in range(5)] != [permuted(i, size, (0, 2)) for i in range(5)]


def test_chances_are_uniform():
  draws = np.array([chance(0, "a", i) for i in range(4000)])
  counts = np.histogram(draws, 10, (0, 1))[0]
  assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi squared with 9 degrees of freedom: p = 0.001
