"""Heat maps of gates: gamma of the memories that are read, by the memory that holds the answer (gates.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot

_HEADS = 8  # most heat maps side by side; beyond, means over heads are drawn


def pooled(results: Sequence[Sequence[dict]]) -> list[dict]:
  """The reads of several results as of one, averaged over all their answer tokens."""
  by_memory: dict[int, list[dict]] = {}
  for read in (read for reads in results for read in reads):
    by_memory.setdefault(read["memory"], []).append(read)
  averages = []
  for held, reads in sorted(by_memory.items()):
    tokens = [read["tokens"] for read in reads]
    gamma = np.average([read["gamma"] for read in reads], axis=0, weights=tokens)
    averages.append({"memory": held, "tokens": sum(tokens), "gamma": gamma.tolist()})
  return averages


def draw(rows: Mapping[tuple[str, ...], Sequence[dict]], title: str = "") -> pyplot.Figure | None:
  """A row of panels for each entry of {label: Result.reads}, a panel for each layer and head; None without entries.

  A panel has a row for each memory that holds answers, framed in white, and a column for each memory that is read. The
  models may have different sizes. Words of labels, such as ("length 64", "pairs 4"), are beside the rows if they differ
  between rows, and in the figure's title if they do not.
  """
  if not rows:
    return None
  shared = [word for word in next(iter(rows)) if all(word in row for row in rows)]
  labels = {row: [word for word in row if word not in shared] for row in rows}
  gammas = {row: np.array([read["gamma"] for read in reads]) for row, reads in rows.items()}  # [held, l, h, read]
  by_head = max(gamma[0, ..., 0].size for gamma in gammas.values()) <= _HEADS
  panels = {row: _panels(gamma, by_head) for row, gamma in gammas.items()}
  columns = max(map(len, panels.values()))
  heights = [0.9 + 0.2 * len(gamma) for gamma in gammas.values()]
  margin = 2.2 + 0.07 * max((len(word) for label in labels.values() for word in label), default=0)
  size = (margin + 2.2 * columns, 0.8 + sum(heights))
  figure, every = pyplot.subplots(
    len(rows), columns, figsize=size, height_ratios=heights, layout="constrained", squeeze=False
  )
  for line, (row, of_row) in zip(every, panels.items(), strict=True):
    held = [read["memory"] for read in rows[row]]
    for axes, (name, gamma) in zip(line, of_row.items(), strict=False):
      image = axes.imshow(gamma, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
      for y, x in enumerate(held):
        axes.add_patch(pyplot.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="white"))
      read = range(0, gamma.shape[1], -(-gamma.shape[1] // 9))
      axes.set_xticks(read, _names(read), fontsize=7)
      axes.set_yticks(range(len(held)), _names(held), fontsize=7)
      axes.set_title(name, fontsize=8)
    for axes in line[len(of_row) :]:
      axes.set_visible(False)
    line[0].set_ylabel("\n".join(labels[row]), fontsize=8, rotation=0, ha="right", va="center", labelpad=8)
  figure.suptitle(", ".join([title] * bool(title) + shared), fontsize=10)
  figure.supxlabel("memory that is read: online, or of a segment", fontsize=9)
  figure.supylabel("memory that holds the answer", fontsize=9)
  figure.colorbar(image, ax=every, label="gamma", fraction=0.05)
  return figure


def _panels(gamma: np.ndarray, by_head: bool) -> dict[str, np.ndarray]:
  """{title: gamma [held, read]} from gamma [held, layers, heads, read]."""
  _, layers, heads, _ = gamma.shape
  if not by_head:
    return {f"layer {i}, all heads": gamma[:, i].mean(1) for i in range(layers)}
  return {f"layer {i}, head {j}": gamma[:, i, j] for i in range(layers) for j in range(heads)}


def _names(memories: Iterable[int]) -> list[str]:
  return ["online" if memory == 0 else f"{memory - 1}" for memory in memories]
