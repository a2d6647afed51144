"""The examples of docs/extending.md, run as they stand."""

import pathlib
import re

import pytest

from mc_jax.memory import aggregate, rules
from mc_jax.models import layer

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "extending.md"


@pytest.fixture
def _registries(monkeypatch):
  """What is registered is forgotten afterwards."""
  for owner, name in ((rules, "_RULES"), (aggregate, "AGGREGATIONS"), (layer, "LAYERS")):
    monkeypatch.setattr(owner, name, dict(getattr(owner, name)))


@pytest.mark.usefixtures("_registries")
@pytest.mark.slow
def test_the_examples_run():
  blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
  assert len(blocks) == 7
  exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "extending"})
