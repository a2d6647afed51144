"""The report of a grid of runs: means and standard errors over seeds, as tables, JSON, CSV and plots.

A cell is a dict, as JSON has it:

    {"values": {"rule": "linear", "aggregation": "grm"}, "seed": 0, "tokens_per_second": .., "results": [..], ..}

with results of `report.to_json`; cells of the same values differ in their seed alone. Cells of several grids may be in
one report.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

import matplotlib

from mc_jax.evaluation import report
from mc_jax.evaluation.subject import Result

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot

JSON = "ablation.json"
_MEASURES = {"accuracy": "accuracy", "bits_per_byte": "bits per byte"}  # what a task is judged by


@dataclasses.dataclass(frozen=True)
class Mean:
  """Of some numbers, with its standard error; nan of a single one."""

  mean: float
  stderr: float
  count: int

  @classmethod
  def of(cls, numbers: Sequence[float]) -> Mean:
    """The mean; the sample's standard deviation (n - 1) over the root of n is its error."""
    count = len(numbers)
    stderr = statistics.stdev(numbers) / math.sqrt(count) if count > 1 else math.nan
    return cls(statistics.fmean(numbers), stderr, count)


@dataclasses.dataclass(frozen=True)
class Group:
  """Cells of the same values, one for each seed."""

  values: dict[str, str]
  cells: list[dict]

  @property
  def label(self) -> str:
    """Such as "linear, grm"."""
    return ", ".join(self.values.values())

  def measured(self) -> dict[tuple[str, tuple], dict[str, Mean]]:
    """{(task, settings): {value's name: its mean}}; settings as pairs of name and value."""
    found: dict[tuple[str, tuple], list[Result]] = {}
    for cell in self.cells:
      for result in report.from_json(cell["results"]):
        found.setdefault((result.task, tuple(result.settings.items())), []).append(result)
    return {
      key: {
        name: Mean.of([r.values[name] for r in results]) for name in results[0].values if not name.endswith("stderr")
      }
      for key, results in found.items()
    }

  def curve(self, settings: tuple) -> list[tuple[float, Mean]]:
    """Loss by position in one setting of perplexity: the geometric middle of each bucket, and the mean there."""
    points: dict[float, list[float]] = {}
    for cell in self.cells:
      for result in report.from_json(cell["results"]):
        if result.task == "perplexity" and tuple(result.settings.items()) == settings:
          for bucket in result.curve:
            points.setdefault(math.sqrt(max(bucket["from"], 1) * bucket["to"]), []).append(bucket["loss"])
    return [(place, Mean.of(losses)) for place, losses in points.items()]


def groups(cells: Sequence[dict]) -> list[Group]:
  """The cells by their values, in the order of the first of each."""
  found: dict[tuple, Group] = {}
  for cell in cells:
    found.setdefault(tuple(cell["values"].items()), Group(cell["values"], [])).cells.append(cell)
  return list(found.values())


def write(folder: pathlib.Path, cells: Sequence[dict]) -> list[str]:
  """Writes ablation.json, table.txt, table.csv and the plots that there is something for; their names."""
  folder.mkdir(parents=True, exist_ok=True)
  every = groups(cells)
  texts = {JSON: json.dumps({"cells": list(cells)}, indent=1) + "\n", "table.txt": table(cells) + "\n"}
  texts["table.csv"] = to_csv(cells)
  for name, text in texts.items():
    (folder / name).write_text(text, encoding="utf-8")
  figures = {f"{name}.png": figure for name, figure in _figures(every)}
  for name, figure in figures.items():
    figure.savefig(folder / name, dpi=110)
    pyplot.close(figure)
  return [*texts, *figures]


def read(folder: pathlib.Path) -> list[dict]:
  """The cells that `write` wrote, [] if it has not."""
  path = folder / JSON
  return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else []


def table(cells: Sequence[dict]) -> str:
  """A block for the speed and one for each task, a line for each combination of values: mean ± standard error."""
  every = groups(cells)
  fields = list(dict.fromkeys(name for group in every for name in group.values))
  seeds = {id(group): str(len(group.cells)) for group in every}
  blocks = {"training": [["seeds", "steps", "tokens per second"]]}
  for group in every:
    speed = Mean.of([cell["tokens_per_second"] for cell in group.cells])
    steps = ", ".join(f"{n:,}" for n in sorted({cell["steps"] for cell in group.cells}))
    blocks["training"].append([seeds[id(group)], steps, _text(speed, ",.0f")])
  for task in _tasks(every):
    settings, shown = _settings(every, task)
    measured = [group.measured() for group in every]
    measure = _measure(measured, task)
    heads = [", ".join(f"{name} {value}" for name, value in s if name in shown) or measure for s in settings]
    title = f"{task}: {_MEASURES.get(measure, measure)}, mean ± standard error over seeds"
    blocks[title] = [["seeds", *heads]]
    for group, found in zip(every, measured, strict=True):
      means = (found.get((task, s), {}).get(measure) for s in settings)
      blocks[title].append([seeds[id(group)], *(_text(mean, ".3f") if mean else "" for mean in means)])
  lines = []
  for title, rows in blocks.items():
    own = [fields, *([group.values.get(field, "") for field in fields] for group in every)]
    rows = [[*values, *row] for values, row in zip(own, rows, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += [title, *("  " + "  ".join(map(str.rjust, row, widths)) for row in rows), ""]
  return "\n".join(lines[:-1])


def to_csv(cells: Sequence[dict]) -> str:
  """A line for each combination of values, task and setting: every value's mean and standard error over seeds."""
  rows = []
  for group in groups(cells):
    speed = {"tokens_per_second": Mean.of([cell["tokens_per_second"] for cell in group.cells])}
    for (task, settings), means in {("training", ()): speed, **group.measured()}.items():
      row = {**group.values, "task": task, **dict(settings)}
      for name, mean in means.items():
        row |= {"seeds": mean.count, name: mean.mean, f"{name}_stderr": "" if mean.count < 2 else mean.stderr}
      rows.append(row)
  file = io.StringIO()
  writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return file.getvalue()


Line = list[tuple[float, Mean]]  # places and what is there


def _figures(every: list[Group]) -> Iterator[tuple[str, pyplot.Figure]]:
  for task in _tasks(every):
    settings, shown = _settings(every, task)
    measured = {id(group): group.measured() for group in every}
    measure = _measure(measured.values(), task)
    x = next((name for name in ("pairs", "length") if name in shown), None)
    if x is not None:
      # Of what else varies, the last: the greatest length, or all the text.
      last = {name: value for name, value in settings[-1] if name != x}
      chosen = [s for s in settings if {name: value for name, value in s if name != x} == last]

      def line(group, task=task, measure=measure, x=x, chosen=chosen, measured=measured) -> Line:
        found = ((dict(s)[x], measured[id(group)].get((task, s))) for s in chosen)
        return sorted(((place, means[measure]) for place, means in found if means), key=lambda point: point[0])

      title = ", ".join([task, *(f"{name} {value}" for name, value in last.items() if name in shown)])
      yield task, _panels(every, line, title, x, _MEASURES.get(measure, measure))
    if task == "perplexity":
      longest = max(settings, key=lambda s: dict(s)["length"])
      title = f"length {dict(longest)['length']}"
      yield "position", _panels(every, lambda g, s=longest: g.curve(s), title, "tokens before", "loss, nats a token")
  if every:
    yield "tokens_per_second", _bars(every)


def _panels(every: list[Group], line: Callable[[Group], Line], title: str, x: str, y: str) -> pyplot.Figure:
  """A panel for each value of all fields but the last, a line for each of the last.

  Cells of another grid, such as a transformer without the fields of a memory, are dashed in every panel.
  """
  fields = max((tuple(group.values) for group in every), key=len)
  own = [group for group in every if tuple(group.values) == fields]
  others = [group for group in every if tuple(group.values) != fields]
  panels: dict[tuple, list[Group]] = {}
  for group in own:
    panels.setdefault(tuple(group.values.values())[:-1], []).append(group)
  lasts = list(dict.fromkeys(group.values[fields[-1]] for group in own)) if fields else [""]
  columns = min(4, len(panels))
  rows = -(-len(panels) // columns)
  size = (max(5.0, 3.6 * columns), 3.4 * rows + 0.6)
  figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=True)
  for panel in axes.flat[len(panels) :]:
    panel.set_visible(False)
  for panel, (values, lines) in zip(axes.flat, panels.items(), strict=False):
    for group in (*others, *lines):
      if points := line(group):
        places, means = zip(*points, strict=True)
        errors = [0.0 if math.isnan(mean.stderr) else mean.stderr for mean in means]
        style = {"color": "0.4", "linestyle": "--"}
        if group in lines:
          style = {"color": f"C{lasts.index(group.values[fields[-1]]) % 10}" if fields else "C0"}
        label = group.values[fields[-1]] if group in lines and fields else group.label or "all"
        ys = [mean.mean for mean in means]
        panel.errorbar(places, ys, errors, marker="o", markersize=3, linewidth=1.2, capsize=2, label=label, **style)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.set(title=", ".join(values), xlabel=x, ylabel=y)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
  low, high = zip(*(panel.get_ylim() for panel in axes.flat[: len(panels)]), strict=True)
  for panel in axes.flat[: len(panels)]:
    panel.set_ylim(min(low), max(high))
  figure.suptitle(title, fontsize=10)
  return figure


def _bars(every: list[Group]) -> pyplot.Figure:
  figure, axes = pyplot.subplots(figsize=(6, 1 + 0.28 * len(every)), layout="constrained")
  speeds = [Mean.of([cell["tokens_per_second"] for cell in group.cells]) for group in every]
  errors = [0.0 if math.isnan(speed.stderr) else speed.stderr for speed in speeds]
  axes.barh(range(len(every)), [speed.mean for speed in speeds], xerr=errors, color="C0", height=0.7)
  axes.set_yticks(range(len(every)), [group.label or "all" for group in every], fontsize=8)
  axes.invert_yaxis()
  axes.xaxis.set_major_formatter("{x:,.0f}")
  axes.set(xlabel="tokens per second in training")
  axes.grid(axis="x", alpha=0.3)
  return figure


def _tasks(every: list[Group]) -> list[str]:
  return list(dict.fromkeys(task for group in every for task, _ in group.measured()))


def _settings(every: list[Group], task: str) -> tuple[list[tuple], list[str]]:
  """The settings of a task, in the order of its results, and the names of those that vary."""
  found = dict.fromkeys(settings for group in every for name, settings in group.measured() if name == task)
  values: dict[str, set] = {}
  for settings in found:
    for name, value in settings:
      values.setdefault(name, set()).add(value)
  return list(found), [name for name in values if len(values[name]) > 1]


def _measure(measured: Iterable[dict], task: str) -> str:
  """The value's name that the task is judged by: one of _MEASURES, or its first."""
  names = [name for means in measured for (other, _), values in means.items() if other == task for name in values]
  return next((name for name in _MEASURES if name in names), names[0])


def _text(mean: Mean, form: str) -> str:
  return f"{mean.mean:{form}}" + ("" if mean.count < 2 else f" ± {mean.stderr:{form}}")
