import numpy as np
import pytest

from mc_jax.data.recall import CopyingConfig, copying
from mc_jax.errors import ConfigError

CONFIGS = [
  (CopyingConfig(), 220),
  (CopyingConfig(2, shortest=1, longest=3), 50),
  (CopyingConfig(26, 30, 30), 62),
]


@pytest.mark.parametrize(("config", "length"), CONFIGS)
@pytest.mark.parametrize("seed", range(5))
def test_strings_come_twice_and_the_second_counts(config, length, seed):
  row = copying.row(config, length, np.random.default_rng(seed))
  assert {name: (array.shape, array.dtype.name) for name, array in row.items()} == {
    "tokens": ((length,), "int32"),
    "targets": ((length,), "int32"),
    "weights": ((length,), "float32"),
  }
  np.testing.assert_array_equal(row["tokens"][1:], row["targets"][:-1])
  ids = [*row["tokens"].tolist(), int(row["targets"][-1])]
  counted = [False, *(row["weights"] == 1)]
  start = 0
  while start < len(ids) and ids[start] == copying.BEGIN:
    end = ids.index(copying.END, start)
    string = (end - start - 2) // 2
    middle = start + string + 1
    assert ids[middle] == copying.SEPARATOR and config.shortest <= string <= config.longest
    assert ids[start + 1 : middle] == ids[middle + 1 : end]
    assert not any(counted[start : middle + 1]) and all(counted[middle + 1 : end]) and not counted[end]
    assert all(copying.END < letter < config.vocab_size for letter in ids[start + 1 : middle])
    start = end + 1
  assert start > 0 and not any(ids[start:]) and not any(counted[start:])
  assert length + 1 - start < 2 * config.longest + 3  # the longest string would not fit


def test_rows_are_a_function_of_the_seed():
  first, again, other = (copying.row(CopyingConfig(), 220, np.random.default_rng(s))["tokens"] for s in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


@pytest.mark.parametrize(
  ("config", "length", "field"),
  [
    (CopyingConfig(), 101, r"data\.length must be at least 102 .* longest of at most 49"),
    (CopyingConfig(letters=0), 220, r"copying\.letters"),
    (CopyingConfig(shortest=0), 220, r"copying\.shortest"),
    (CopyingConfig(shortest=60), 220, r"copying\.longest must be at least copying\.shortest=60"),
  ],
)
def test_what_cannot_be_is_refused_by_name(config, length, field):
  with pytest.raises(ConfigError, match=field):
    copying.row(config, length, np.random.default_rng(0))


def test_the_shortest_row_holds_the_longest_string():
  row = copying.row(CopyingConfig(26, 50, 50), 102, np.random.default_rng(0))
  assert row["weights"].sum() == 50 and row["targets"][-1] == copying.END
