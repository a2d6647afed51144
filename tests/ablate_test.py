"""The door: `python -m mc_jax.ablate` as its user meets it."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from mc_jax.ablation import report, runner
from mc_jax.ablation.grid import Cell

ROOT = pathlib.Path(__file__).parent.parent
TINY = {
  "data.mqar.pairs": "(2,)",
  "data.length": 8,
  "data.batch_size": 2,
  "data.validation_tokens": 16,
  "model.layers": 1,
  "model.d_model": 8,
  "model.mlp_dim": 8,
  "model.memory.aggregation": "none",
  "train.steps": 2,
}


BASE = ["--config=configs/mqar.py", *(f"--config.{field}={value}" for field, value in TINY.items())]


def _ablate(*flags):
  cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
  command = [sys.executable, "-m", "mc_jax.ablate", *([] if "--report" in flags else BASE), *flags]
  return subprocess.run(command, cwd=ROOT, env=os.environ | cache, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_cells_are_trained_evaluated_reported_and_not_run_again(tmp_path):
  # 256 ids do not fit into a model of 128: what the trainer finds once it has the data
  flags = ["--grid=model.memory.rule=linear", "--grid=model.vocab_size=128,256", f"--workdir={tmp_path}"]
  flags += ["--tasks=mqar", "--pairs=1,2", "--rows=4", "--processes=2"]
  done = _ablate(*flags)
  assert done.returncode == 1, done.stderr
  assert "rule=linear,model.vocab_size=128,seed=0: crashed" in done.stdout
  assert "| error: model.vocab_size=128 must be at least 256" in done.stdout
  assert "1 of 2 cells crashed: rule=linear,model.vocab_size=128,seed=0" in done.stdout
  (cell,) = json.loads((tmp_path / "report" / "ablation.json").read_text())["cells"]
  assert cell["values"] == {"rule": "linear", "model.vocab_size": "256"}
  assert [result["settings"]["pairs"] for result in cell["results"]] == [1, 2]
  assert "linear" in (tmp_path / "report" / "table.txt").read_text()
  assert (tmp_path / "report" / "mqar.png").exists()
  commands = (tmp_path / "report" / "commands.txt").read_text().splitlines()
  assert f"python -m mc_jax.ablate --report --workdir={tmp_path}" in commands
  assert "--grid=model.memory.rule=linear" in commands[-1]

  folder = tmp_path / "cells" / cell["name"]
  finished = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
  listed = _ablate(*flags, "--dry_run").stdout
  assert f"1  {cell['name']}: finished" in listed
  assert listed.count("python -m mc_jax.train") == listed.count("python -m mc_jax.evaluate") == 1
  done = _ablate(*flags, "--cell=1")
  assert done.returncode == 0, done.stderr
  assert finished == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

  for path in (tmp_path / "report").iterdir():
    if path.suffix != ".json":
      path.unlink()
  folder.rename(tmp_path / "elsewhere")
  assert _ablate("--report", f"--workdir={tmp_path}").returncode == 0
  assert (tmp_path / "report" / "mqar.png").exists()


def test_cells_are_told_what_suits_them(door, tmp_path):
  told = ["--rows=4", "--limit=0.5", "--num_fewshot=1", f"--include_path={tmp_path}"]
  flags = [f"--workdir={tmp_path}", "--grid=model.pattern=attention,memory", "--tasks=gates_mqar,mqar"]
  listed = door("ablate", *BASE, *flags, "--config.model.memory.aggregation=grm", *told, "--dry_run").stdout
  assert "gates_mqar is left out: it needs gates, which model.pattern=attention does not have" in listed
  assert "(in pattern=attention,seed=0)" in listed
  transformer, caching = (line for line in listed.splitlines() if "mc_jax.evaluate" in line)
  assert f" --tasks=mqar {' '.join(told)} --name=ablation" in transformer
  assert f" --tasks=gates_mqar,mqar {' '.join(told)} --name=ablation" in caching


def test_a_cell_is_evaluated_again_where_it_is_told_otherwise(tiny, tmp_path, monkeypatch):
  monkeypatch.setattr(runner.Job, "trained", True)
  told = ("--tasks=mqar", "--rows=4", "--include_path=my tasks")
  cell = Cell(0, "cell", {}, 0, (), tiny())
  record = runner.Job(cell, tmp_path, told).commands()[0]
  (tmp_path / "evaluation").mkdir()
  facts = {"step": cell.config.train.steps, "command": shlex.join(["python", *record])}
  (tmp_path / "evaluation" / f"{runner.EVALUATION}.json").write_text(json.dumps(facts))
  assert runner.Job(cell, tmp_path, told).commands() == []
  for other in (told[:2], (*told, "--limit=3"), ("--tasks=niah1", *told[1:])):
    assert runner.Job(cell, tmp_path, other).commands() == [["-m", *record[1:3], *other, record[-1]]]


def test_what_was_evaluated_once_stays_until_it_is_again(tmp_path):
  result = {"task": "mqar", "settings": {"pairs": 2}, "values": {"accuracy": 0.5}}
  cell = {"name": "a", "values": {"rule": "a"}, "seed": 0, "steps": 2, "tokens_per_second": 1.0, "results": [result]}
  for found, steps in ((cell, 2), (cell | {"steps": 4, "results": []}, 2), (cell | {"steps": 4}, 4)):
    report.update(tmp_path / "report", [found])
    (reported,) = report.read(tmp_path / "report")
    assert (reported["steps"], reported["results"]) == (steps, [result])


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (
      ["--grid=model.memory.rul=linear"],
      "there is no --config.model.memory.rul; the nearest field is model.memory.rule",
    ),
    (["--grid=model.memory.rule=linear", "--config.model.heads", "4"], "--config.FIELD=VALUE, each one argument"),
    (["--grid=model.memory.rule=linear", "--tasks=mqar", "--pairs=4"], "got 8 (in rule=linear,seed=0)"),
  ],
  ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_end_with_a_clean_message(door, tmp_path, flags, message):
  done = door("ablate", *BASE, f"--workdir={tmp_path}", *flags)
  assert done.returncode == 2
  assert message in done.stderr
  assert "Traceback" not in done.stderr
  assert not list(tmp_path.iterdir())
