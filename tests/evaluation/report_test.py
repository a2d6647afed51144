"""Tables, CSV and JSON hold what came out, and what has something to draw is drawn."""

import csv
import json

import pytest

from mc_jax.evaluation import Result, report

CURVE = ({"from": 0, "to": 16, "tokens": 64, "loss": 2.0}, {"from": 16, "to": 64, "tokens": 192, "loss": 1.0})
TEXT = [
  Result("perplexity", {"length": n, "source": "text"}, {"loss": 1.25, "bits_per_byte": 1.8}, CURVE) for n in (32, 64)
]
RECALL = [Result("mqar", {"length": 64, "pairs": p}, {"accuracy": 1 / p, "stderr": 0.01, "rows": 1024}) for p in (2, 4)]


def test_a_table_has_a_block_for_each_task():
  lines = report.table(TEXT + RECALL).splitlines()
  assert lines[0] == "perplexity"
  assert lines[1].split() == ["length", "source", "loss", "bits_per_byte"]
  assert lines[6].split() == ["length", "pairs", "accuracy", "stderr", "rows"]
  assert lines[8].split() == ["64", "4", "0.2500", "0.0100", "1,024"]
  assert len({len(line) for line in lines[6:9]}) == 1
  assert report.line(RECALL[0]) == "mqar, length 64, pairs 2: accuracy 0.5000, stderr 0.0100, rows 1,024"


def test_csv_has_a_line_for_each_result():
  rows = list(csv.DictReader(report.to_csv(TEXT + RECALL).splitlines()))
  assert [row["task"] for row in rows] == ["perplexity", "perplexity", "mqar", "mqar"]
  assert (rows[0]["loss"], rows[0]["accuracy"], rows[3]["accuracy"]) == ("1.25", "", "0.25")


def test_json_gives_the_results_back():
  assert report.from_json(json.loads(json.dumps(report.to_json(TEXT + RECALL)))) == TEXT + RECALL


@pytest.mark.parametrize(
  ("series", "panels"),
  [
    ({"run": TEXT}, 2),
    ({"run": RECALL}, 1),
    ({"one": TEXT + RECALL, "two": TEXT}, 3),
    ({"run": TEXT[:1] + RECALL[:1]}, 0),
  ],
)
def test_what_varies_is_drawn(tmp_path, series, panels):
  path = tmp_path / "x.png"
  assert report.plot(path, series) == bool(panels)
  assert len(list(report._panels(series))) == panels
  assert path.exists() == bool(panels)


def test_a_single_series_has_a_curve_for_every_length_several_one_each():
  (_, _, _, curves), (_, _, _, lengths) = report._panels({"run": TEXT})
  assert set(curves) == {"length 32", "length 64"}
  assert [point[:2] for point in lengths["run"]] == [(32, 1.8), (64, 1.8)]
  assert [y for _, y, _ in curves["length 32"]] == pytest.approx([2.88, 1.44])
  (_, _, _, curves), _ = report._panels({"one": TEXT, "two": TEXT})
  assert set(curves) == {"one", "two"}


def test_against_a_baseline_differences_are_drawn():
  better = [Result(r.task, r.settings, {**r.values, "bits_per_byte": 1.5}) for r in TEXT]
  _, panel = report._panels({"base": TEXT, "new": better})
  _, _, y, lines = report._minus(panel, "base")
  assert y == "bits per byte, less that of base"
  assert [value for _, value, _ in lines["base"]] == [0, 0]
  assert [value for _, value, _ in lines["new"]] == pytest.approx([-0.3, -0.3])
