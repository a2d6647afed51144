"""Tables, CSV and JSON hold what came out, and what has something to draw is drawn."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from mc_jax.evaluation import Result, heatmaps, report

CURVE = ({"from": 0, "to": 16, "tokens": 64, "loss": 2.0}, {"from": 16, "to": 64, "tokens": 192, "loss": 1.0})
TEXT = [
  Result("perplexity", {"length": n, "source": "text"}, {"loss": 1.25, "bits_per_byte": 1.8}, CURVE) for n in (32, 64)
]
READS = (
  {"memory": 0, "tokens": 3, "gamma": [[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]]},
  {"memory": 2, "tokens": 1, "gamma": [[[0.0, 0.0, 1.0], [0.0, 0.25, 0.75]]]},
)
GATES = [Result("gates_mqar", {"length": 24, "pairs": p}, {"gamma_right": 0.5}, reads=READS) for p in (2, 4)]
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
  every = TEXT + RECALL + GATES
  record = report.dumps({"results": report.to_json(every)})
  assert report.from_json(json.loads(record)["results"]) == every
  assert "[0.0, 0.25, 0.75]" in record
  old = [{name: value for name, value in result.items() if name != "reads"} for result in report.to_json(TEXT)]
  assert report.from_json(old) == TEXT


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
  assert report.plot(path, series) == [path] * bool(panels)
  assert len(list(report._panels(series))) == panels
  assert path.exists() == bool(panels)


def test_gates_are_heat_maps_beside_the_rest(tmp_path):
  path = tmp_path / "x.png"
  assert report.plot(path, {"run": GATES}) == [path, tmp_path / "x_map.png"]
  assert report.plot(path, {"run": GATES[:1]}) == [tmp_path / "x_map.png"]
  figure = heatmaps.draw(report._reads({"run": GATES}))
  drawn = [axes for axes in figure.axes if axes.get_title()]
  assert [axes.get_title() for axes in drawn] == ["layer 0, head 0", "layer 0, head 1"] * 2
  assert figure.get_suptitle() == "gates_mqar, length 24"
  assert [axes.get_ylabel() for axes in drawn[::2]] == ["pairs 2", "pairs 4"]  # all that the rows differ in
  figure.canvas.draw()
  above, below = (axes.yaxis.label.get_window_extent() for axes in drawn[::2])
  assert above.y0 > below.y1
  (image,) = drawn[1].images
  np.testing.assert_allclose(image.get_array(), [[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
  assert [frame.get_xy() for frame in drawn[1].patches] == [(-0.5, -0.5), (1.5, 0.5)]  # own memory: online, segment 1
  assert [text.get_text() for text in drawn[0].get_yticklabels()] == ["online", "1"]


def test_of_many_heads_the_means_are_drawn():
  gamma = np.random.default_rng(0).random((3, 4, 5))
  figure = heatmaps.draw({("run",): [{"memory": 1, "tokens": 2, "gamma": gamma.tolist()}]})
  drawn = [axes for axes in figure.axes if axes.get_title()]
  assert [axes.get_title() for axes in drawn] == [f"layer {i}, all heads" for i in range(3)]
  np.testing.assert_allclose(drawn[2].images[0].get_array(), gamma[2].mean(0)[None])


def test_a_file_is_drawn_again_as_it_was(tmp_path):
  (tmp_path / "both=1.json").write_text(report.dumps({"results": report.to_json(RECALL + GATES)}))
  written = report.plot(tmp_path / "both=1.png", {"both=1": RECALL + GATES})
  assert len(written) == 2
  again = tmp_path / "again.png"
  command = ["-m", "mc_jax.evaluation.compare", f"--png={again}", str(tmp_path / "both=1.json")]
  subprocess.run([sys.executable, *command], check=True, capture_output=True)
  for old, new in zip(written, (again, report.map_path(again)), strict=True):
    assert old.read_bytes() == new.read_bytes()


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
