"""Grids: which cells there are, what each is told, and what is refused before any of them runs."""

import pytest

from mc_jax.ablation import grid
from mc_jax.errors import ConfigError

BASE = ["--config=configs/mqar.py", "--config.train.steps=7", "--config.train.seed=3"]


def test_cells_are_all_combinations_from_every_seed():
  cells = grid.cells(BASE, ["model.memory.rule=linear,swla", "data.mqar.pairs=(2,),(2, 4)"], seeds=2)
  assert [cell.number for cell in cells] == list(range(8))
  assert [cell.name for cell in cells[:4]] == [
    "rule=linear,pairs=2,seed=3",
    "rule=linear,pairs=2+4,seed=3",
    "rule=swla,pairs=2,seed=3",
    "rule=swla,pairs=2+4,seed=3",
  ]
  assert len({cell.name for cell in cells}) == 8
  for cell in cells:
    assert cell.config.train.steps == 7
    assert cell.config.model.memory.rule == cell.values["rule"]
    assert str(cell.config.data.mqar.pairs) in (cell.values["pairs"], "(2,)")
    assert cell.config.train.seed == cell.seed == cell.config.data.seed + 3
  assert {cell.seed for cell in cells[4:]} == {4}


def test_a_cells_arguments_make_its_configuration():
  for cell in grid.cells(BASE, ["optimizer.learning_rate=1e-3,3e-3", "model.tied_embeddings=True,False"]):
    assert grid.read(cell.arguments) == cell.config
  assert len({cell.config.optimizer.learning_rate for cell in grid.cells(BASE, ["optimizer.learning_rate=1,2"])}) == 2


@pytest.mark.parametrize(
  ("field", "short"),
  [
    ("model.memory.rule", "rule"),
    ("data.seed", "data.seed"),
    ("model.vocab_size", "model.vocab_size"),
    ("model.memory.top_k", "top_k"),  # as folders were called before memory layers had one
    ("model.product_keys.top_k", "product_keys.top_k"),
    ("model.product_keys.codebook", "codebook"),
    ("optimizer.learning_rate", "learning_rate"),
  ],
)
def test_names_are_as_short_as_they_can_be(field, short):
  assert grid.short_name(field) == short


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    (["model.memory.agregation=none"], "the nearest field is model.memory.aggregation"),
    (["model.memory=none"], "is a group"),
    (["model.memory.rule=linear,"], "--grid must be FIELD=VALUE,VALUE"),
    (["model.memory.rule"], "--grid must be FIELD=VALUE,VALUE"),
    (["model.memory.rule=linear,linear"], "a value is given twice"),
    (["model.layers=1", "model.layers=2"], "model.layers is given twice"),
    (["train.steps=1,2"], "train.steps is given twice"),
    (["data.seed=1,2"], "use --seeds instead"),
    (["model.layers=1,two"], "two"),
    (["data.mqar.pairs=(2,4),(2,4,)"], r"two cells would be called pairs=2\+4,seed=3"),
    (["model.memory.rule=linear,lin,swla", "model.heads=1,2"], r"'lin' is not one of .* \(in rule=lin,heads=1,seed=3"),
    (["model.heads=2,3"], r"model.heads=3 does not divide .* \(in heads=3,seed=3\)"),
  ],
  ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused(axes, message):
  with pytest.raises(ConfigError, match=message):
    grid.cells(BASE, axes)


def test_a_missing_file_is_refused():
  with pytest.raises(ConfigError, match=r"nowhere\.py"):
    grid.cells(["--config=configs/nowhere.py"], [])
