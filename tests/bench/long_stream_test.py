"""The long stream of long_stream.py, made short."""

import gc

import pytest

from mc_jax.bench import long_stream


@pytest.mark.slow
@pytest.mark.parametrize(
  ("combination", "block"),
  [
    (("titans", "ssc", "independent", "float32"), 1250),
    (("titans", "grm", "checkpoint", "float64"), 5000),
    (("linear", "ssc", "checkpoint", "float32"), 4096),
  ],
  ids=str,
)
def test_a_stream_ends_where_a_prefill_does(combination, block):
  gc.collect()  # what other tests left is not to go in the middle of this one
  record = long_stream.stream(*combination, 20_000, rows=4, block=block)
  assert [block["tokens"] for block in record["blocks"]] == [*range(4 * block, 20_000, 4 * block), 20_000]
  assert long_stream.problems(record) == []


def test_what_is_not_as_it_should_be_is_told():
  good = {"tokens": 1, "resident_mib": 100.0, "array_bytes": 8, "state": 1e-6, "cached": 1e-6, "pass": 1e-6}
  names = dict(zip(long_stream.NAMES, long_stream.COMBINATIONS[1], strict=True))

  def problems(**changes):
    return long_stream.problems(names | {"blocks": [good, good, good | changes, good]})

  assert problems() == []
  assert problems(state=2e-5) == ["state differs by 2e-05 after 1 tokens"]
  assert problems(cached=float("nan")) == ["cached differs by nan after 1 tokens"]
  assert problems(array_bytes=9) == ["arrays are left behind"]
  assert problems(resident_mib=200.0) == ["the process grew by 50.0 MiB"]
