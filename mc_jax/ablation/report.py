"""The report of a grid of runs: means and standard errors over seeds, as tables, JSON, CSV and plots.

A cell is a dict with JSON's types:

    {"values": {"rule": "linear", "aggregation": "grm"}, "seed": 0, "tokens_per_second": .., "results": [..],
     "grid": "python -m mc_jax.ablate ..", ..}

with results from evaluation/report.py's `to_json`. Cells of the same values differ only in their seed. A report may
have cells of several grids.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import pathlib
import shlex
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

import matplotlib

from mc_jax import storage
from mc_jax.evaluation import heatmaps, report
from mc_jax.evaluation.subject import Result

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot

JSON = "ablation.json"
_TICKS = 6  # up to this number of points on the x axis, each has a tick
# The measures that tasks are compared by, the first that a task has.
_MEASURES = {
  "accuracy": "accuracy",
  "bits_per_byte": "bits per byte",
  "gamma_right": "gamma of the memory that holds the answer",
}


@dataclasses.dataclass(frozen=True)
class Mean:
  """A mean of `count` numbers and its standard error, which is nan for a single number."""

  mean: float
  stderr: float
  count: int

  @classmethod
  def of(cls, numbers: Sequence[float]) -> Mean:
    """The mean of numbers; its standard error is the sample standard deviation (n - 1) over sqrt(n)."""
    count = len(numbers)
    stderr = statistics.stdev(numbers) / math.sqrt(count) if count > 1 else math.nan
    return cls(statistics.fmean(numbers), stderr, count)


Line = list[tuple[float, Mean]]  # (x, y)


@dataclasses.dataclass(frozen=True)
class Group:
  """Cells of the same values, one per seed."""

  values: dict[str, str]
  cells: list[dict]

  @property
  def label(self) -> str:
    """For example "linear, grm, segment_length 16"."""
    return _label(self.values)

  def measured(self) -> dict[tuple[str, tuple], dict[str, Mean]]:
    """{(task, settings): {measure: mean}}; settings are pairs of name and value."""
    by_setting: dict[tuple[str, tuple], list[Result]] = {}
    for cell in self.cells:
      for key, result in _results(cell).items():
        by_setting.setdefault(key, []).append(result)
    return {
      key: {
        name: Mean.of([r.values[name] for r in results]) for name in results[0].values if not name.endswith("stderr")
      }
      for key, results in by_setting.items()
    }

  def settings(self, task: str) -> list[tuple]:
    """A task's settings in the order of its results: the last has the greatest length, or all the text."""
    return [settings for name, settings in self.measured() if name == task]

  def line(self, task: str, measure: str, x: str) -> Line:
    """A measure against x, in the settings that differ from the last one only in x."""
    settings, measured = self.settings(task), self.measured()
    rest = _without(settings[-1], x) if settings else ()
    points = [(dict(s)[x], measured[task, s][measure]) for s in settings if _without(s, x) == rest and x in dict(s)]
    return sorted(points, key=lambda point: point[0])

  def last(self, task: str, measure: str) -> Mean | None:
    """A measure in the last setting; None if the task was not evaluated."""
    settings = self.settings(task)
    return self.measured()[task, settings[-1]][measure] if settings else None

  @property
  def speed(self) -> Mean:
    """Tokens per second in training."""
    return Mean.of([cell["tokens_per_second"] for cell in self.cells])

  def reads(self, task: str) -> list[dict]:
    """Result.reads in the last setting, pooled over seeds; [] if the task does not measure gates."""
    settings = self.settings(task)
    results = [_results(cell).get((task, settings[-1])) for cell in self.cells if settings]
    return heatmaps.pooled([result.reads for result in results if result])

  def curve(self, settings: tuple) -> list[tuple[float, Mean]]:
    """Loss by position in one setting of perplexity: each bucket's geometric middle and the mean over seeds."""
    points: dict[float, list[float]] = {}
    for cell in self.cells:
      if result := _results(cell).get(("perplexity", settings)):
        for bucket in result.curve:
          points.setdefault(math.sqrt(max(bucket["from"], 1) * bucket["to"]), []).append(bucket["loss"])
    return [(position, Mean.of(losses)) for position, losses in points.items()]


def _results(cell: dict) -> dict[tuple[str, tuple], Result]:
  """A cell's results by task and settings. A setting evaluated twice counts once: it is no second seed."""
  return {(result.task, tuple(result.settings.items())): result for result in report.from_json(cell["results"])}


def groups(cells: Sequence[dict]) -> list[Group]:
  """The cells grouped by their values, in the order of the first cell of each group."""
  by_values: dict[tuple, Group] = {}
  for cell in cells:
    by_values.setdefault(tuple(cell["values"].items()), Group(cell["values"], [])).cells.append(cell)
  return list(by_values.values())


def update(folder: pathlib.Path, cells: Sequence[dict]) -> str:
  """Writes the report of finished cells, together with those of an earlier report, and returns the table to print.

  Args:
    folder: The report's folder.
    cells: The finished cells. One without results keeps those of the earlier report: its evaluation is yet to come.
  """
  finished = {cell["name"]: cell for cell in read(folder)}
  for cell in cells:
    if cell["results"] or not finished.get(cell["name"], {}).get("results"):
      finished[cell["name"]] = cell
  if not finished:
    return f"{folder.parent} has no finished cell to report"
  files = write(folder, list(finished.values()))
  return f"\n{table(list(finished.values()))}\n\nwritten to {folder}: {', '.join(files)}"


def write(folder: pathlib.Path, cells: Sequence[dict]) -> list[str]:
  """Writes ablation.json, tables, commands.txt and figures, and returns the files' names.

  Everything is derived from what ablation.json keeps of the cells.
  """
  folder.mkdir(parents=True, exist_ok=True)
  cells = compact(cells)
  every = groups(cells)
  texts = {JSON: _dumps(cells), "table.txt": table(cells) + "\n", "table.csv": to_csv(cells)}
  texts["commands.txt"] = commands(folder, cells)
  for name, text in texts.items():
    storage.write(folder / name, text)
  figures = {f"{name}.png": figure for name, figure in _figures(every)}
  for name, figure in figures.items():
    report.save(figure, folder / name)
  return [*texts, *figures]


def compact(cells: Sequence[dict]) -> list[dict]:
  """The cells as ablation.json keeps them: numbers with eight digits, and only those gates that are drawn.

  Gates take most of a cell's bytes. Only those of the last setting are drawn, and a picture has 256 colours: three
  decimal places are kept.
  """
  drawn = {}
  for group in groups(cells):
    for task in _tasks([group]):
      drawn[tuple(group.values.items()), task] = dict(group.settings(task)[-1])
  compacted = []
  for cell in cells:
    values, results = tuple(cell["values"].items()), []
    for result in report.to_json(report.from_json(cell["results"])):
      reads = result.pop("reads", ())
      kept = _rounded(result, ".8g")
      if reads and result["settings"] == drawn[values, result["task"]]:
        kept["reads"] = _rounded(reads, ".3f")
      results.append(kept)
    compacted.append(_rounded({**cell, "results": ()}, ".8g") | {"results": results})
  return compacted


def _rounded(tree: object, form: str) -> object:
  """Nested dicts and lists with their floats rounded."""
  if isinstance(tree, dict):
    return {name: _rounded(value, form) for name, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [_rounded(value, form) for value in tree]
  return float(format(tree, form)) if isinstance(tree, float) else tree


def _dumps(cells: Sequence[dict]) -> str:
  """JSON with one line per cell, without spaces."""
  lines = ",\n".join(json.dumps(cell, separators=(",", ":")) for cell in cells)
  return f'{{"cells":[\n{lines}\n]}}\n'


def read(folder: pathlib.Path) -> list[dict]:
  """The cells of a report that `write` wrote; [] if there is none."""
  path = folder / JSON
  return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else []


def commands(folder: pathlib.Path, cells: Sequence[dict]) -> str:
  """The commands that reproduce the report in `folder` and its cells."""
  lines = [
    f"# Redraws everything here from {JSON} alone",
    f"python -m mc_jax.ablate --report --workdir={shlex.quote(str(folder.parent))}",
  ]
  if grids := dict.fromkeys(cell["grid"] for cell in cells if cell.get("grid")):
    lines += ["", "# Trains and evaluates the cells again, given another --workdir", *grids]
  return "\n".join(lines) + "\n"


def table(cells: Sequence[dict]) -> str:
  """A block for training speed and one per task, a line per combination of values: mean ± standard error."""
  every = groups(cells)
  fields = list(dict.fromkeys(name for group in every for name in group.values))
  blocks = {"training": [["seeds", "steps", "tokens per second"]]}
  for group in every:
    steps = ", ".join(f"{n:,}" for n in sorted({cell["steps"] for cell in group.cells}))
    blocks["training"].append([str(len(group.cells)), steps, _text(group.speed, ",.0f")])
  for task in _tasks(every):
    settings, shown = _settings(every, task)
    measured = [group.measured() for group in every]
    measure = _measure(measured, task)
    heads = [", ".join(f"{name} {value}" for name, value in s if name in shown) or measure for s in settings]
    title = f"{task}: {_MEASURES.get(measure, measure)}, mean ± standard error over seeds"
    blocks[title] = [["seeds", *heads]]
    for of_group in measured:
      means = [of_group.get((task, s), {}).get(measure) for s in settings]
      seeds = max((mean.count for mean in means if mean), default=0)  # only those that were evaluated
      blocks[title].append([str(seeds or ""), *(_text(mean, ".3f") if mean else "" for mean in means)])
  lines = []
  for title, rows in blocks.items():
    heads = [fields, *([group.values.get(field, "") for field in fields] for group in every)]
    rows = [[*head, *row] for head, row in zip(heads, rows, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += [title, *("  " + "  ".join(map(str.rjust, row, widths)) for row in rows), ""]
  return "\n".join(lines[:-1])


def to_csv(cells: Sequence[dict]) -> str:
  """A line per combination of values, task and setting: every measure's mean and standard error over seeds."""
  rows = []
  for group in groups(cells):
    speed = {("training", ()): {"tokens_per_second": group.speed}}
    for (task, settings), means in {**speed, **group.measured()}.items():
      # A cell's data.length is not the length it was evaluated at: the latter gets the task's name in front.
      columns = {f"{task}_{name}" if name in group.values else name: value for name, value in settings}
      row = {**group.values, "task": task, **columns}
      for name, mean in means.items():
        row |= {"seeds": mean.count, name: mean.mean, f"{name}_stderr": "" if mean.count < 2 else mean.stderr}
      rows.append(row)
  file = io.StringIO()
  writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return file.getvalue()


def _figures(every: list[Group]) -> Iterator[tuple[str, pyplot.Figure]]:
  fields = max((tuple(group.values) for group in every), key=len, default=())
  for task in _tasks(every):
    measure = _measure((group.measured() for group in every), task)
    y = _MEASURES.get(measure, measure)
    if x := next((name for name in ("pairs", "length") if any(_varies(g.settings(task), name) for g in every)), None):
      lines = [(group.values, group.line(task, measure, x)) for group in every]
      yield task, _panels(lines, fields, _title(every, task, x), x, y)
    for field in _numeric(every):
      lines = _along(every, field, lambda group, task=task, measure=measure: group.last(task, measure))
      yield f"{task}_by_{field}", _panels(lines, _others(fields, field), _title(every, task), field, y)
    if task == "perplexity":
      lines = [(group.values, group.curve(group.settings(task)[-1]) if group.settings(task) else []) for group in every]
      yield "position", _panels(lines, fields, _title(every, task), "tokens before", "loss, nats a token")
    reads = {_words(group.values): reads for group in every if (reads := group.reads(task))}
    if figure := heatmaps.draw(reads, _title(every, task)):
      yield f"{task}_map", figure
  for field in _numeric(every):
    lines = _along(every, field, lambda group: group.speed)
    yield (
      f"tokens_per_second_by_{field}",
      _panels(lines, _others(fields, field), "training", field, "tokens per second"),
    )
  if every:
    yield "tokens_per_second", _bars(every)


def _words(values: dict[str, str]) -> tuple[str, ...]:
  """A group's values as words: a number is preceded by its field."""
  return tuple(value if math.isnan(_number(value)) else f"{name} {value}" for name, value in values.items())


def _label(values: dict[str, str]) -> str:
  return ", ".join(_words(values))


def _numeric(every: list[Group]) -> dict[str, tuple[float, ...]]:
  """The fields that have several values, all of them numbers, and these values in ascending order."""
  distinct: dict[str, set[float]] = {}
  for field, value in (item for group in every for item in group.values.items()):
    distinct.setdefault(field, set()).add(_number(value))
  return {
    field: tuple(sorted(values)) for field, values in distinct.items() if len(values) > 1 and math.nan not in values
  }


def _number(text: str) -> float:
  """The number that a text is; nan if it is none."""
  try:
    return float(text) if math.isfinite(float(text)) else math.nan
  except ValueError:
    return math.nan


def _along(
  every: list[Group], field: str, mean_of: Callable[[Group], Mean | None]
) -> list[tuple[dict[str, str], Line]]:
  """Mean against a numeric field: a line for groups that differ only in it, a level line for those without it."""
  xs = _numeric(every)[field]
  lines: dict[tuple, Line] = {}
  for group in every:
    if (mean := mean_of(group)) is not None:
      at = [_number(group.values[field])] if field in group.values else [xs[0], xs[-1]]
      line = lines.setdefault((field in group.values, _without(tuple(group.values.items()), field)), [])
      line += [(x, mean) for x in at]
  return [(dict(values), sorted(line, key=lambda point: point[0])) for (_, values), line in lines.items()]


def _panels(
  lines: Sequence[tuple[dict[str, str], Line]], fields: tuple[str, ...], title: str, x: str, y: str
) -> pyplot.Figure:
  """A panel for each combination of all `fields` except the last, with a line for each value of the last.

  Lines of another grid, such as a transformer without the fields of a memory, are dashed in every panel.
  """
  solid = [(values, line) for values, line in lines if tuple(values) == fields]
  others = [(values, line) for values, line in lines if tuple(values) != fields]
  panels: dict[tuple, list] = {}
  for values, line in solid:
    panels.setdefault(tuple(values.items())[:-1], []).append((values, line))
  panels = panels or {(): []}
  lasts = [dict(last) for last in dict.fromkeys(tuple(values.items())[-1:] for values, _ in solid)]
  columns = min(4, len(panels))
  rows = -(-len(panels) // columns)
  size = (max(5.0, 3.6 * columns), 3.4 * rows + 0.6)
  figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=True)
  for panel in axes.flat[len(panels) :]:
    panel.set_visible(False)
  xs = sorted({x for _, line in lines for x, _ in line})
  for panel, (values, drawn) in zip(axes.flat, panels.items(), strict=False):
    for other in others:
      _draw(panel, other[1], _label(other[0]) or "all", color="0.4", linestyle="--")
    for line_values, line in drawn:
      last = {name: line_values[name] for name in fields[-1:]}
      _draw(panel, line, _label(last) or "all", color=f"C{lasts.index(last) % 10}")
    if xs and xs[0] > 0:
      panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda x, _: f"{x:,.4g}" if x < 1000 else f"{x:,.0f}")
    if len(xs) <= _TICKS:
      panel.set_xticks(xs)
      panel.minorticks_off()
    panel.set(title=_label(dict(values)), xlabel=x, ylabel=y)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
  low, high = zip(*(panel.get_ylim() for panel in axes.flat[: len(panels)]), strict=True)
  for panel in axes.flat[: len(panels)]:
    panel.set_ylim(min(low), max(high))
  figure.suptitle(title, fontsize=10)
  return figure


def _draw(panel: pyplot.Axes, line: Line, label: str, **style: str) -> None:
  if line:
    xs, means = zip(*line, strict=True)
    errors = [0.0 if math.isnan(mean.stderr) else mean.stderr for mean in means]
    ys = [mean.mean for mean in means]
    panel.errorbar(xs, ys, errors, marker="o", markersize=3, linewidth=1.2, capsize=2, label=label, **style)


def _bars(every: list[Group]) -> pyplot.Figure:
  figure, axes = pyplot.subplots(figsize=(6, 1 + 0.28 * len(every)), layout="constrained")
  speeds = [group.speed for group in every]
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


def _title(every: list[Group], task: str, x: str | None = None) -> str:
  """The task, and the settings that vary elsewhere but that all groups' last settings share, except x."""
  lasts = [dict(group.settings(task)[-1]) for group in every if group.settings(task)]
  agreed = set.intersection(*(set(last.items()) for last in lasts))
  _, shown = _settings(every, task)
  common = {name: value for name, value in lasts[0].items() if (name, value) in agreed and name in shown and name != x}
  return ", ".join([task, *(f"{name} {value}" for name, value in common.items())])


def _without(pairs: tuple, name: str) -> tuple:
  """Pairs of names and values, except the pair of one name."""
  return tuple(pair for pair in pairs if pair[0] != name)


def _others(fields: tuple[str, ...], field: str) -> tuple[str, ...]:
  return tuple(name for name in fields if name != field)


def _varies(settings: Iterable[tuple], name: str) -> bool:
  return len({dict(s).get(name) for s in settings}) > 1


def _settings(every: list[Group], task: str) -> tuple[list[tuple], list[str]]:
  """A task's settings in the order of its results, and the names of those that vary."""
  distinct = dict.fromkeys(settings for group in every for name, settings in group.measured() if name == task)
  values: dict[str, set] = {}
  for settings in distinct:
    for name, value in settings:
      values.setdefault(name, set()).add(value)
  return list(distinct), [name for name in values if len(values[name]) > 1]


def _measure(measured: Iterable[dict], task: str) -> str:
  """The measure that a task is compared by: the first of _MEASURES it has, or its first value."""
  names = [name for means in measured for (other, _), values in means.items() if other == task for name in values]
  return next((name for name in _MEASURES if name in names), names[0])


def _text(mean: Mean, form: str) -> str:
  return f"{mean.mean:{form}}" + ("" if mean.count < 2 else f" ± {mean.stderr:{form}}")
