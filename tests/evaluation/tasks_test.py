"""Which tasks there are, and what is said of others."""

import re
import sys

import pytest

from mc_jax import evaluation
from mc_jax.data import DataConfig
from mc_jax.errors import ConfigError
from mc_jax.evaluation import Options, tasks


def test_tasks_of_the_harness_need_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
  monkeypatch.delitem(sys.modules, "mc_jax.evaluation.harness", raising=False)
  monkeypatch.delattr(evaluation, "harness", raising=False)
  assert tasks.check(["mqar", "mqar"]) == ("mqar",)
  with pytest.raises(ConfigError, match=r"pip install -e '\.\[eval\]'"):
    tasks.check(["mqar", "lm_eval:piqa"])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"pairs": (8, 4, 8)}, "--pairs must be numbers that differ, got 8, 4, 8"),
    ({"limit": 0}, "--limit must be .* got 0"),
    ({"limit": 2.5}, "--limit must be .* got 2.5"),
    ({"num_fewshot": -1}, "--num_fewshot must be at least 0, got -1"),
    ({"include_path": "nowhere"}, "--include_path must be a folder, got nowhere"),
  ],
)
def test_options_that_cannot_be(options, message):
  with pytest.raises(ConfigError, match=message):
    Options(**options).check()


@pytest.mark.parametrize(
  ("source", "names", "options", "message"),
  [
    ("mqar", ["mqar"], {"pairs": (4, 64)}, r"--tasks=mqar: data.length must be .*pairs=\(64,\), got 64"),
    ("stdlib", ["gates_mqar"], {"pairs": (64,)}, r"--tasks=gates_mqar: data.length must be .*pairs=\(64,\), got 64"),
    ("mqar", ["mqar", "perplexity"], {}, r"--tasks=perplexity is of text; data.source=mqar is a recall task"),
    ("niah", ["lm_eval:piqa"], {}, r"--tasks=lm_eval:piqa is of text"),
    (
      "stdlib",
      ["perplexity"],
      {"lengths": (24, 64)},
      r"--lengths of perplexity must divide .* got 24",
    ),
    ("stdlib", ["perplexity", "mqar", "niah1"], {"lengths": (32, 64)}, None),
    ("mqar", ["mqar", "gates_mqar", "niah3"], {"pairs": (2, 16)}, None),
    ("facts", ["facts"], {"lengths": (3, 64)}, r"--tasks=facts: data.length must be at least 4, .* got 3"),
    ("facts", ["facts", "mqar"], {}, None),
  ],
)
def test_what_data_have_no_answer_to(source, names, options, message):
  found = tasks.problems(names, DataConfig(source=source, length=64), Options(**options))
  assert len(found) == (message is not None)
  if message:
    assert re.search(message, found[0])
