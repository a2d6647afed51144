import itertools

import numpy as np
import pytest

from mc_jax.bench import mqar_statistics as statistics
from mc_jax.data.recall import TASKS, MQARConfig, mqar
from mc_jax.errors import ConfigError

SEEDS = range(5)
SIZES = [(8, 1), (64, 4), (64, 16), (256, 7)]


@pytest.mark.parametrize("filler", [True, False])
@pytest.mark.parametrize(("length", "pairs"), SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_pair_once_every_key_asked_once_every_answer_right(seed, length, pairs, filler):
  config = MQARConfig(pairs=(pairs,), random_non_queries=filler)
  row = mqar.row(config, length, np.random.default_rng(seed))
  assert {name: (array.shape, array.dtype.name) for name, array in row.items()} == {
    "tokens": ((length,), "int32"),
    "targets": ((length,), "int32"),
    "weights": ((length,), "float32"),
  }
  keys, values = row["tokens"][0 : 2 * pairs : 2], row["tokens"][1 : 2 * pairs : 2]
  assert len(set(keys)) == len(set(values)) == pairs
  assert keys.min() >= 1 and keys.max() < 4096 <= values.min() and values.max() < 8192

  (asked,) = np.nonzero(row["weights"])
  assert (row["weights"][asked] == 1).all() and len(asked) == pairs
  assert (asked >= 2 * pairs).all() and (asked % 2 == 0).all()
  assert sorted(row["tokens"][asked]) == sorted(keys)
  answer = dict(zip(keys, values, strict=True))
  assert [answer[key] for key in row["tokens"][asked]] == list(row["targets"][asked])

  others = np.setdiff1d(np.arange(length - 1), asked)
  np.testing.assert_array_equal(row["targets"][others], row["tokens"][others + 1])
  rest = np.setdiff1d(np.arange(2 * pairs, length), asked)
  assert (row["tokens"][rest] > 0).any() == (filler and len(rest) > 0)


def test_rows_are_a_function_of_the_seed():
  first, again, other = (mqar.row(MQARConfig(), 64, np.random.default_rng(seed))["tokens"] for seed in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_several_numbers_of_pairs_are_equally_likely():
  config = MQARConfig(pairs=(2, 5, 9))
  counts = np.zeros(10)
  for seed in range(600):
    counts[int(mqar.row(config, 64, np.random.default_rng(seed))["weights"].sum())] += 1
  assert set(np.flatnonzero(counts)) == {2, 5, 9}
  assert statistics.chi_square(counts[[2, 5, 9]], np.ones(3)) > 1e-3


@pytest.fixture(scope="module")
def batch():
  """Rows in a vocabulary that 4,000 rows cover."""
  return statistics.sample(MQARConfig(vocab_size=64, pairs=(6,)), 64, rows=4000, seed=0)


def test_the_whole_distribution_of_gaps_where_it_can_be_listed():
  """All 24 ordered choices of 3 among 4 slots, by the definition: one after the other, among those left."""
  p = statistics.power_law(4, 0.01)
  orders = list(itertools.permutations(range(4), 3))
  chances = np.array([p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b]) for a, b, c in orders])
  np.testing.assert_allclose(chances.sum(), 1)
  gaps = statistics.sample(MQARConfig(pairs=(3,)), 14, rows=4000, seed=1)["gaps"]
  counts = np.array([(gaps == order).all(1).sum() for order in orders])
  assert statistics.chi_square(counts, chances) > 1e-3
  assert statistics.chi_square(counts, np.ones(24)) < 1e-6
  exact = [[chances[[order[j] == s for order in orders]].sum() for s in range(4)] for j in range(3)]
  np.testing.assert_allclose(statistics.draws(p, 3), exact, rtol=1e-6)  # the reference of the next test


def test_marginals_are_those_of_the_definition(batch):
  exact = statistics.draws(statistics.power_law(26, 0.01), 6)
  np.testing.assert_allclose(exact.sum(1), 1, rtol=1e-6)
  p_values = statistics.marginals(batch, MQARConfig(vocab_size=64, pairs=(6,)), exact)["p"]
  assert min(p_values.values()) > 1e-3, p_values


def test_marginals_tell_another_distribution(batch):
  """Another power, uniform gaps, and pairs in another order are told from the definition."""
  exact = statistics.draws(statistics.power_law(26, 0.01), 6)
  counts = np.bincount(batch["gaps"][:, 0], minlength=26)
  for other in (statistics.power_law(26, 0.3), np.ones(26), exact[5]):
    assert statistics.chi_square(counts, other) < 1e-6


@pytest.mark.parametrize(
  ("config", "length", "field"),
  [
    (MQARConfig(pairs=(4, 17)), 64, r"data\.length must be even and at least 68"),
    (MQARConfig(pairs=(4,)), 65, r"data\.length must be even"),
    (MQARConfig(pairs=()), 64, r"mqar\.pairs"),
    (MQARConfig(pairs=(0,)), 64, r"mqar\.pairs"),
    (MQARConfig(vocab_size=16, pairs=(8,)), 64, r"mqar\.pairs=\(8,\) needs 8 distinct keys.*at least 18"),
    (MQARConfig(vocab_size=3), 64, r"mqar\.vocab_size"),
    (MQARConfig(power_a=0), 64, r"mqar\.power_a"),
  ],
)
def test_what_cannot_be_is_refused_by_name(config, length, field):
  with pytest.raises(ConfigError, match=field):
    mqar.row(config, length, np.random.default_rng(0))


def test_the_smallest_sizes_work():
  mqar.row(MQARConfig(vocab_size=18, pairs=(8,)), 32, np.random.default_rng(0))
  mqar.row(MQARConfig(vocab_size=4, pairs=[1]), 4, np.random.default_rng(0))


def test_every_task_is_listed_by_name():
  assert set(TASKS) == {"mqar", "niah", "copying", "facts"}
  for name, task in TASKS.items():
    assert task.config().problems(f"data.{name}", length=1024) == []
    row = task.row(task.config(), 1024, np.random.default_rng(0))
    assert row["weights"].sum() > 0
    vocab = task.config().vocab_size or 256
    assert all(row[name].min() >= 0 and row[name].max() < vocab for name in ("tokens", "targets"))
