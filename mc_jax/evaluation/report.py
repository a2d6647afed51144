"""Results as a table, JSON, CSV and plots."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import matplotlib

from mc_jax import storage
from mc_jax.evaluation import heatmaps
from mc_jax.evaluation.subject import Result

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot

_LISTS = ("curve", "reads", "usage")  # a result's fields that most tasks leave empty


def line(result: Result) -> str:
  """One result: "mqar, length 64, pairs 8: accuracy 0.9310, stderr 0.0052"."""
  settings = ", ".join([result.task, *(f"{name} {value}" for name, value in result.settings.items())])
  return f"{settings}: {', '.join(f'{name} {_text(value)}' for name, value in result.values.items())}"


def table(results: Sequence[Result]) -> str:
  """The results, task by task, settings and values in columns."""
  blocks = []
  for task, group in _by_task(results).items():
    names = list(dict.fromkeys(name for result in group for name in (*result.settings, *result.values)))
    rows = [names, *([_text((r.settings | r.values).get(name, "")) for name in names] for r in group)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    blocks.append("\n".join([task, *(f"  {line}" for line in lines)]))
  return "\n\n".join(blocks)


def to_csv(results: Sequence[Result]) -> str:
  """A line for each result, without curves; columns that do not apply to a task are empty."""
  columns = dict.fromkeys(["task"])
  columns |= dict.fromkeys(name for result in results for name in result.settings)
  columns |= dict.fromkeys(name for result in results for name in result.values)
  file = io.StringIO()
  writer = csv.DictWriter(file, list(columns), lineterminator="\n")
  writer.writeheader()
  writer.writerows({"task": result.task, **result.settings, **result.values} for result in results)
  return file.getvalue()


def to_json(results: Sequence[Result]) -> list[dict]:
  """The results as JSON types, for `from_json`; lists that are empty are left out."""
  return [{k: v for k, v in dataclasses.asdict(result).items() if v or k not in _LISTS} for result in results]


def from_json(results: Sequence[dict]) -> list[Result]:
  """The results from `to_json`, also from files of earlier releases."""
  return [Result(**{**result, **{name: tuple(result.get(name, ())) for name in _LISTS}}) for result in results]


def dumps(record: dict) -> str:
  """JSON, indented except for lists of numbers, which are on one line."""
  text = json.dumps(record, indent=1)
  return re.sub(r"\[\n[-+\d.e,\s]+\]", lambda match: "".join(match[0].split()).replace(",", ", "), text) + "\n"


def save(figure: pyplot.Figure, path: pathlib.Path, dpi: int = 110) -> None:
  """Writes a figure as PNG, and closes it."""
  image = io.BytesIO()
  figure.savefig(image, dpi=dpi, format="png")
  pyplot.close(figure)
  storage.write(path, image.getvalue())


def plot(path: pathlib.Path, series: Mapping[str, Sequence[Result]], baseline: str | None = None) -> list[pathlib.Path]:
  """Draws {label: results}: tasks with several lengths or numbers of pairs in `path`, gates in `map_path(path)`, the
  usage of values in `usage_path(path)`.

  Perplexity has two panels: by position in rows of the greatest length (of every length for a single series), and by
  length. Other tasks show their first value, such as accuracy, with its standard error. With a `baseline`, everything
  except gates and usage is drawn as the difference from the series of that label, without errors, because both have
  the same rows.

  Returns:
    The files that were written: only those with something to draw.
  """
  figures = {
    path: _lines(series, baseline),
    map_path(path): heatmaps.draw(_reads(series)),
    usage_path(path): _usage(series),
  }
  figures = {path: figure for path, figure in figures.items() if figure}
  for path, figure in figures.items():
    save(figure, path)
  return list(figures)


def map_path(path: pathlib.Path) -> pathlib.Path:
  """The file for gates: x_map.png beside x.png."""
  return path.with_stem(f"{path.stem}_map")


def usage_path(path: pathlib.Path) -> pathlib.Path:
  """The file for the usage of values: x_usage.png beside x.png."""
  return path.with_stem(f"{path.stem}_usage")


def _usage(series: Mapping[str, Sequence[Result]]) -> pyplot.Figure | None:
  """The values' shares of weight, the most used first; equal shares would be a level line."""
  lines = {
    (label, result.settings["layer"]): result.usage
    for label, results in series.items()
    for result in results
    if result.usage
  }
  if not lines:
    return None
  figure, axes = pyplot.subplots(figsize=(5.2, 4.2), layout="constrained")
  for (label, layer), points in lines.items():
    drawn = [(point["row"], point["share"]) for point in points if point["share"] > 0]
    axes.plot(
      *zip(*drawn, strict=True), linewidth=1.2, label=f"{label}, layer {layer}" if len(series) > 1 else f"layer {layer}"
    )
  axes.set(
    xscale="log", yscale="log", title="usage of values", xlabel="value, the most used first", ylabel="share of weight"
  )
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  return figure


def _reads(series: Mapping[str, Sequence[Result]]) -> dict[tuple[str, ...], Sequence[dict]]:
  """{(label, task, each setting): reads} of results that have any; a single series needs no label."""
  reads = {}
  for label, results in series.items():
    for result in results:
      if result.reads:
        name = result.task, *(f"{name} {value}" for name, value in result.settings.items())
        reads[(label, *name) if len(series) > 1 else name] = result.reads
  return reads


def _lines(series: Mapping[str, Sequence[Result]], baseline: str | None) -> pyplot.Figure | None:
  panels = [_minus(panel, baseline) if baseline else panel for panel in _panels(series)]
  if not panels:
    return None
  figure, every = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), layout="constrained", squeeze=False)
  for axes, (title, x, y, lines) in zip(every[0], panels, strict=True):
    for label, points in lines.items():
      xs, ys, errors = zip(*points, strict=True)
      axes.errorbar(xs, ys, [error or 0 for error in errors], marker="o", markersize=3, linewidth=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
  return figure


Panel = tuple[str, str, str, dict[str, list[tuple[float, float, float | None]]]]  # title, x, y, {label: points}


def _panels(series: Mapping[str, Sequence[Result]]) -> Iterator[Panel]:
  tasks = {label: _by_task(results) for label, results in series.items()}
  for task in dict.fromkeys(task for groups in tasks.values() for task in groups):
    results = {label: groups[task] for label, groups in tasks.items() if task in groups}
    if task == "usage":
      continue  # a figure of its own
    draw = _perplexity if task == "perplexity" else _measured
    yield from (panel for panel in draw(task, results) if any(len(points) > 1 for points in panel[3].values()))


def _minus(panel: Panel, baseline: str) -> Panel:
  """The differences between a panel's lines and the baseline, where the baseline has a point."""
  title, x, y, lines = panel
  start = {place: value for place, value, _ in lines.get(baseline, ())}
  differences = {
    label: [(place, value - start[place], None) for place, value, _ in points if place in start]
    for label, points in lines.items()
  }
  return title, x, f"{y}, less that of {baseline}", differences


def _perplexity(task: str, series: Mapping[str, Sequence[Result]]) -> Iterator[Panel]:
  every = [result for results in series.values() for result in results]
  if len({result.settings["length"] for result in every}) < 2:
    return
  longest = max(result.settings["length"] for result in every)
  curves, lengths = {}, {}
  for label, results in series.items():
    for result in results:
      name = _label(label, result, "source", series, results)
      lengths.setdefault(name, []).append((result.settings["length"], result.values["bits_per_byte"], None))
      if len(series) > 1 and result.settings["length"] < longest:
        continue
      name = _label(name, result, "length", series, results) if len(series) == 1 else name
      bits = result.values["bits_per_byte"] / result.values["loss"]
      curves[name] = [(math.sqrt(max(c["from"], 1) * c["to"]), bits * c["loss"], None) for c in result.curve]
  yield "by position", "bytes or tokens before, in the row", "bits per byte", curves
  yield "on average", "length of rows", "bits per byte", {name: sorted(points) for name, points in lengths.items()}


def _measured(task: str, series: Mapping[str, Sequence[Result]]) -> Iterator[Panel]:
  every = [result for results in series.values() for result in results]
  x = "pairs" if len({result.settings.get("pairs") for result in every}) > 1 else "length"
  other = "length" if x == "pairs" else "pairs"
  measure = next(iter(every[0].values))
  lines = {}
  for label, results in series.items():
    for result in results:
      name = _label(label, result, other, series, results)
      error = result.values.get("stderr", result.values.get(f"{measure}_stderr"))
      lines.setdefault(name, []).append((result.settings[x], result.values[measure], error))
  yield task, x, measure, {name: sorted(points) for name, points in lines.items()}


def _label(label: str, result: Result, setting: str, series: Mapping, results: Sequence[Result]) -> str:
  """The series' label, followed by the setting if the series has several values of it."""
  if len({r.settings.get(setting) for r in results}) < 2:
    return label
  words = f"{setting} {result.settings[setting]}"
  return f"{label}, {words}" if len(series) > 1 else words


def _by_task(results: Sequence[Result]) -> dict[str, list[Result]]:
  groups: dict[str, list[Result]] = {}
  for result in results:
    groups.setdefault(result.task, []).append(result)
  return groups


def _text(value: float | str) -> str:
  return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
