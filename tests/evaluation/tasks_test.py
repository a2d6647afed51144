"""Which tasks there are, and what is said of others."""

import sys

import pytest

from mc_jax import evaluation
from mc_jax.data import ConfigError
from mc_jax.evaluation import Options, tasks


def test_tasks_of_the_harness_need_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
  monkeypatch.delitem(sys.modules, "mc_jax.evaluation.harness", raising=False)
  monkeypatch.delattr(evaluation, "harness", raising=False)
  assert tasks.check(["mqar", "mqar"]) == ("mqar",)
  with pytest.raises(ConfigError, match=r"pip install 'mc_jax\[eval\]'"):
    tasks.check(["mqar", "lm_eval:piqa"])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"limit": 0}, "--limit must be .* got 0"),
    ({"limit": 2.5}, "--limit must be .* got 2.5"),
    ({"num_fewshot": -1}, "--num_fewshot must be at least 0, got -1"),
    ({"include_path": "nowhere"}, "--include_path must be a folder, got nowhere"),
  ],
)
def test_options_that_cannot_be(options, message):
  with pytest.raises(ConfigError, match=message):
    Options(**options).check()
