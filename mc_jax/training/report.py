"""The report of a run: a table, a curve, a sample."""

from __future__ import annotations

import math
import pathlib

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot

from mc_jax.evaluation.report import save

CURVE = "loss.png"
TABLE = "report.txt"
SAMPLE = "sample.txt"


def table(rows: dict[str, str], title: str) -> str:
  """Rows under a title, with names and values in columns."""
  width = max(map(len, rows))
  lines = [f"  {name:<{width}}  {value}" for name, value in rows.items()]
  return "\n".join([title, *lines])


def curve(
  path: pathlib.Path,
  records: list[dict[str, float]],
  lines: dict[str, float],
  unit: str = "byte",
  units_per_token: float = 1.0,
) -> None:
  """Draws training and validation bits per byte, or per other unit, against steps.

  Args:
    path: The PNG to write.
    records: The records of metrics.read.
    lines: {name: bits per byte} of references, drawn as horizontal lines.
    unit: The unit of the validation's records.
    units_per_token: Divides the training loss, which is per token.
  """
  steps = np.array([record["step"] for record in records if "loss" in record])
  bits = np.array([record["loss"] for record in records if "loss" in record]) / math.log(2) / units_per_token
  name = f"validation_bits_per_{unit}"
  validation = [(record["step"], record[name]) for record in records if name in record]
  figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
  axes.plot(steps, bits, color="tab:blue", alpha=0.25, linewidth=0.8)
  axes.plot(*_smooth(steps, bits), color="tab:blue", label="training")
  if validation:
    axes.plot(*zip(*validation, strict=True), "o-", color="tab:orange", label="validation")
  for (label, value), style in zip(lines.items(), (":", "--", "-."), strict=False):
    axes.axhline(value, color="tab:gray", linestyle=style, label=f"{label}: {value:.2f}")
  axes.set_xlabel("step")
  axes.set_ylabel(f"bits per {unit}")
  axes.legend()
  axes.grid(alpha=0.3)
  save(figure, path, dpi=120)


def _smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Means over windows of 2% of the run."""
  window = max(1, len(values) // 50)
  if len(values) < window:
    return steps, values
  kernel = np.ones(window) / window
  return steps[window - 1 :], np.convolve(values, kernel, mode="valid")
