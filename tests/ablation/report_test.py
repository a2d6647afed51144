"""The report of a grid: numbers that can be worked out by hand, files that redraw themselves."""

import csv
import json
import math

import numpy as np
import pytest

from mc_jax.ablation import report
from mc_jax.evaluation.report import from_json, to_json
from mc_jax.evaluation.subject import Result


def _cell(rule, aggregation, seed, accuracies, speed=100.0):
  curve = tuple({"from": n, "to": 2 * n, "tokens": 5, "loss": 1 / n + seed} for n in (16, 32, 64))
  values = {"loss": 1.0, "perplexity": math.e, "bits_per_byte": 2.0 + seed, "tokens": 9}
  results = [Result("perplexity", {"length": 64, "source": "text"}, values, curve)]
  for pairs, accuracy in accuracies.items():
    values = {"accuracy": accuracy, "stderr": 0.5, "loss": 1 - accuracy, "rows": 8}
    results.append(Result("mqar", {"length": 64, "pairs": pairs}, values))
  own = {"rule": rule, "aggregation": aggregation} if rule else {"mixer": aggregation}
  name = f"{rule},{aggregation},{seed}"
  facts = {"name": name, "values": own, "seed": seed, "number": 0, "steps": 10, "tokens_per_second": speed}
  return facts | {"results": to_json(results)}


CELLS = [
  _cell("linear", "none", 0, {2: 0.5, 4: 0.25}, 100.0),
  _cell("linear", "grm", 0, {2: 1.0, 4: 0.75}),
  _cell("swla", "none", 0, {2: 0.5, 4: 0.5}),
  _cell("linear", "none", 1, {2: 0.7, 4: 0.25}, 300.0),
  _cell("linear", "none", 2, {2: 0.9, 4: 0.25}, 200.0),
  _cell(None, "transformer", 0, {2: 1.0, 4: 1.0}),
]


def test_means_and_standard_errors_are_over_seeds():
  rows = list(csv.DictReader(report.to_csv(CELLS).splitlines()))
  (row,) = (r for r in rows if (r["rule"], r["aggregation"], r["task"], r["pairs"]) == ("linear", "none", "mqar", "2"))
  assert row["seeds"] == "3"
  numbers = [0.5, 0.7, 0.9]
  assert float(row["accuracy"]) == pytest.approx(np.mean(numbers))
  assert float(row["accuracy_stderr"]) == pytest.approx(np.std(numbers, ddof=1) / np.sqrt(3))
  (row,) = (r for r in rows if (r["rule"], r["aggregation"], r["task"]) == ("linear", "none", "training"))
  assert float(row["tokens_per_second"]) == pytest.approx(200)
  (row,) = (r for r in rows if (r["rule"], r["aggregation"], r["task"], r["pairs"]) == ("linear", "grm", "mqar", "4"))
  assert float(row["accuracy"]) == 0.75
  assert row["accuracy_stderr"] == ""  # of one seed there is none


def test_the_table_has_a_line_for_each_combination():
  lines = [" ".join(line.split()) for line in report.table(CELLS).splitlines()]
  assert "linear none 3 10 200 ± 58" in lines
  assert "linear none 3 0.700 ± 0.115 0.250 ± 0.000" in lines
  assert "linear grm 1 1.000 0.750" in lines
  assert "transformer 1 1.000 1.000" in lines
  assert "linear none 3 3.000 ± 0.577" in lines  # bits per byte
  assert "rule aggregation mixer seeds pairs 2 pairs 4" in lines


def test_curves_are_means_by_position():
  group = report.groups(CELLS)[0]
  points = group.curve((("length", 64), ("source", "text")))
  assert [place for place, _ in points] == pytest.approx([n * math.sqrt(2) for n in (16, 32, 64)])
  assert [mean.mean for _, mean in points] == pytest.approx([1 / n + 1 for n in (16, 32, 64)])


def test_the_files_are_redrawn_from_the_json_alone(tmp_path):
  names = report.write(tmp_path / "a", CELLS)
  assert names == [
    "ablation.json",
    "table.txt",
    "table.csv",
    "commands.txt",
    "position.png",
    "mqar.png",
    "tokens_per_second.png",
  ]
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "ablation.json").write_text((tmp_path / "a" / "ablation.json").read_text())
  assert report.write(tmp_path / "b", report.read(tmp_path / "b")) == names
  for name in names:
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
  assert report.read(tmp_path / "a") == report.compact(CELLS)


def test_the_json_is_compact_and_an_older_one_can_be_read(tmp_path):
  gamma = [[[0.12345, 0.87655]]]
  results = [
    Result("gates_mqar", {"pairs": n}, {"gamma_right": 1 / 3}, reads=({"memory": 1, "tokens": 7, "gamma": gamma},))
    for n in (2, 4)
  ]
  cell = _cell("linear", "grm", 0, {2: 2 / 3}, 1234.56789)
  cell["results"] += to_json(results)
  written = report.write(tmp_path, [cell, CELLS[0]])
  text = (tmp_path / "ablation.json").read_text()
  assert len(text.splitlines()) == 4  # a line for each cell
  assert '"tokens_per_second":1234.5679,' in text
  (kept, _) = report.read(tmp_path)
  by_settings = {(r["task"], r["settings"].get("pairs")): r for r in kept["results"]}
  assert by_settings["mqar", 2]["values"]["accuracy"] == 0.66666667
  assert by_settings["gates_mqar", 2] == {
    "task": "gates_mqar",
    "settings": {"pairs": 2},
    "values": {"gamma_right": 0.33333333},
  }
  (read,) = by_settings["gates_mqar", 4]["reads"]  # the last of the settings, which is drawn
  assert read == {"memory": 1, "tokens": 7, "gamma": [[[0.123, 0.877]]]}
  made = {name: (tmp_path / name).read_bytes() for name in written}
  old = [c | {"results": [{"curve": [], "reads": []} | r for r in c["results"]]} for c in (cell, CELLS[0])]
  (tmp_path / "ablation.json").write_text(json.dumps({"cells": old}, indent=1))
  assert report.write(tmp_path, report.read(tmp_path)) == written
  assert {name: (tmp_path / name).read_bytes() for name in written} == made


def _swept(length, segment_length, pairs=(2, 4)):
  cell = _cell("linear", "grm", 0, {n: length / segment_length / 100 + n for n in pairs}, 1e6 / length)
  results = [r for r in from_json(cell["results"]) if r.task == "mqar"]
  for result in results:
    result.settings["length"] = length
  values = {"aggregation": "grm", "length": str(length), "segment_length": str(segment_length)}
  return cell | {"values": values, "results": to_json(results)}


def test_numeric_fields_of_the_grid_are_axes(tmp_path):
  cells = [_swept(length, segment) for length in (128, 64) for segment in (8, 16)]
  none = _swept(64, 8) | {"values": {"aggregation": "none", "length": "64"}}
  every = report.groups([*cells, none])
  assert report._numeric(every) == {"length": (64, 128), "segment_length": (8, 16)}
  lines = report._along(every, "segment_length", lambda group: group.last("mqar", "accuracy"))
  by_values = {tuple(values.values()): [(place, mean.mean) for place, mean in line] for values, line in lines}
  assert by_values == {
    ("grm", "128"): [(8, 4.16), (16, 4.08)],
    ("grm", "64"): [(8, 4.08), (16, 4.04)],
    ("none", "64"): [(8, 4.08), (16, 4.08)],  # has no segments: as high everywhere
  }
  names = [f"{what}_by_{field}.png" for what in ("mqar", "tokens_per_second") for field in ("length", "segment_length")]
  written = report.write(tmp_path, cells)
  assert [name for name in written if "_by_" in name] == names
  assert "mqar.png" in written  # against pairs, each cell at its own length


def test_a_cells_own_length_is_not_that_of_its_rows():
  cell = _swept(64, 8, pairs=(2,))
  rows = list(csv.DictReader(report.to_csv([cell | {"values": cell["values"] | {"length": "32"}}]).splitlines()))
  assert [(row["length"], row["mqar_length"]) for row in rows] == [("32", ""), ("32", "64")]


def test_words_and_single_numbers_are_no_axes():
  def every(*values):
    return report.groups([_swept(64, 8) | {"values": {"x": value}} for value in values])

  assert report._numeric(every("1e-3", "3e-3")) == {"x": (0.001, 0.003)}
  for values in (("linear", "titans"), ("8",), ("8", "logarithmic"), ("(2,)", "4"), ("nan", "1")):
    assert report._numeric(every(*values)) == {}


def test_gates_are_pooled_over_seeds_and_drawn(tmp_path):
  cells = []
  for seed, (tokens, gamma) in enumerate([(10, 0.25), (30, 0.75)]):
    reads = ({"memory": 1, "tokens": tokens, "gamma": [[[1 - gamma, gamma, 0.0]]]},)
    result = Result("gates_mqar", {"length": 24, "pairs": 2}, {"gamma_right": gamma, "tokens": tokens}, reads=reads)
    cells.append(_cell("linear", "grm", seed, {}) | {"results": to_json([result])})
  (group,) = report.groups(cells)
  (read,) = group.reads("gates_mqar")
  assert (read["memory"], read["tokens"]) == (1, 40)
  assert read["gamma"] == [[pytest.approx([0.375, 0.625, 0.0])]]
  assert group.reads("mqar") == []
  assert "gates_mqar_map.png" in report.write(tmp_path, cells)


def test_the_commands_of_a_report_are_written(tmp_path):
  grids = ["python -m mc_jax.ablate --grid=a", "python -m mc_jax.ablate --grid=b"]
  folder = tmp_path / "my runs" / "report"
  report.write(folder, [cell | {"grid": grids[n % 2]} for n, cell in enumerate(CELLS)])
  lines = (folder / "commands.txt").read_text().splitlines()
  assert [line for line in lines if not line.startswith("#") and line] == [
    f"python -m mc_jax.ablate --report --workdir='{folder.parent}'",
    *grids,
  ]


def test_without_tasks_there_are_the_speeds():
  cells = [cell | {"results": [], "values": {}} for cell in CELLS]
  assert "tokens per second" in report.table(cells)


def test_a_task_without_accuracy_is_judged_by_its_first_value():
  cells = [cell | {"results": to_json([Result("x", {"length": 8}, {"f1": 0.5, "f1_stderr": 0.1})])} for cell in CELLS]
  assert "x: f1, mean ± standard error over seeds" in report.table(cells)


def test_what_was_asked_twice_is_no_second_seed():
  cells = [cell | {"results": cell["results"] * 2} for cell in CELLS]
  assert report.table(cells) == report.table(CELLS)
  assert report.to_csv(cells) == report.to_csv(CELLS)


def test_seeds_are_those_that_were_evaluated():
  cells = [cell | {"results": [] if cell["seed"] == 2 else cell["results"]} for cell in CELLS]
  lines = [" ".join(line.split()) for line in report.table(cells).splitlines()]
  assert "linear none 3 10 200 ± 58" in lines
  assert "linear none 2 0.600 ± 0.100 0.250 ± 0.000" in lines


def test_a_write_that_fails_leaves_the_last_report(tmp_path, monkeypatch):
  report.write(tmp_path, CELLS)
  monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
  with pytest.raises(OSError, match="killed"):
    report.write(tmp_path, CELLS[:1])
  assert report.read(tmp_path) == report.compact(CELLS)
