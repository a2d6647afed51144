"""Steps to trace: how they are written, and that a trace is left."""

import pytest

from mc_jax.errors import ConfigError
from mc_jax.training import profiling


def test_parse():
  assert profiling.parse("10-12") == range(10, 13)
  assert profiling.parse("7") == range(7, 8)


@pytest.mark.parametrize("text", ["", "x", "12-10", "0-3", "1-", "-3", "1,2"])
def test_anything_else_is_an_error(text):
  with pytest.raises(ConfigError, match="--profile must be steps such as 10-12"):
    profiling.parse(text)


@pytest.mark.parametrize("first", [1, 3])
def test_a_trace_is_left_also_by_a_run_that_starts_within_it(tmp_path, first):
  with profiling.Trace(range(2, 4), tmp_path) as trace:
    for step in range(first, 6):
      trace.before(step)
      trace.after(step, ())
  assert list((tmp_path / profiling.FOLDER).rglob("*.xplane.pb"))
