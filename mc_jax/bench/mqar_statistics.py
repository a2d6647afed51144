"""Compares rows of MQAR with the marginals that follow from its definition (arXiv:2312.04927).

    python -m mc_jax.bench.mqar_statistics --out=docs/recall/mqar

compares the generator's rows in the paper's sizes with the formulas, and writes OUT.json and OUT.png.
"""

from __future__ import annotations

import json

import matplotlib
import numpy as np
from absl import flags
from scipy import stats

from mc_jax import cli
from mc_jax.data.recall import mqar

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot

_OUT = cli.path_flag("out", None, "Path of the .json and .png, without an extension.")
_ROWS = flags.DEFINE_integer("rows", 20_000, "Rows of each size.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the rows.")

SIZES = ((64, 4), (128, 8), (256, 16), (512, 64))  # (length, pairs)


def power_law(slots: int, power_a: float) -> np.ndarray:
  """p(g) = a g^(a - 1) / sum, for g = 1 .. slots: [slots]."""
  gaps = np.arange(1, slots + 1, dtype=float)
  density = power_a * gaps ** (power_a - 1)
  return density / density.sum()


def draws(p: np.ndarray, count: int, nodes: int = 400) -> np.ndarray:
  """P(the j-th draw without replacement is slot s), [count, slots], exact up to the quadrature.

  Drawing without replacement with probabilities proportional to p gives the order in which clocks with rates p ring.
  Slot s is the j-th to ring (j from 0) with probability

      integral over time t of p_s exp(-p_s t) P(exactly j of the others rang before t) dt,

  where the number of the others is a sum of independent Bernoulli variables with probabilities 1 - exp(-p_i t). With
  u = exp(-t), and rates in units of the smallest, the integrand is smooth on [0, 1].
  """
  rates = p / p.min()
  x, w = np.polynomial.legendre.leggauss(nodes)
  u, w = (x + 1) / 2, w / 2
  ring = 1 - u ** rates[:, None]  # [slots, nodes]
  result = np.empty((count, len(p)))
  for s, rate in enumerate(rates):
    rang = np.zeros((count, nodes))  # P(exactly j rang), j < count
    rang[0] = 1
    for i in range(len(p)):
      if i != s:
        rang[1:] = rang[1:] * (1 - ring[i]) + rang[:-1] * ring[i]
        rang[0] *= 1 - ring[i]
    result[:, s] = rang @ (w * rate * u ** (rate - 1))
  return result


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
  """p-value of `counts` under `probabilities`; neighbours are merged into bins of an expected count of at least 10."""
  expected = counts.sum() * probabilities / probabilities.sum()
  starts, total = [0], 0.0
  for i, value in enumerate(expected):
    if total >= 10:
      starts.append(i)
      total = 0.0
    total += value
  if total < 10 and len(starts) > 1:
    starts.pop()
  return float(stats.chisquare(np.add.reduceat(counts, starts), np.add.reduceat(expected, starts)).pvalue)


def sample(config: mqar.MQARConfig, length: int, rows: int, seed: int) -> dict[str, np.ndarray]:
  """Rows of the generator: tokens, targets, weights [rows, length], and gaps [rows, pairs] (see `gaps`)."""
  drawn = [mqar.row(config, length, np.random.default_rng((seed, i))) for i in range(rows)]
  batch = {name: np.stack([row[name] for row in drawn]) for name in drawn[0]}
  (pairs,) = config.pairs
  return batch | {"gaps": gaps(batch["tokens"], batch["weights"], pairs)}


def gaps(tokens: np.ndarray, weights: np.ndarray, pairs: int) -> np.ndarray:
  """The slot of each pair's query, [rows, pairs]."""
  keys = tokens[:, None, 0 : 2 * pairs : 2]
  rest, asked = tokens[:, 2 * pairs :: 2, None], weights[:, 2 * pairs :: 2, None] == 1
  queried = (rest == keys) & asked  # [rows, slots, pairs]
  assert (queried.sum(1) == 1).all(), "every key is queried once"
  return queried.argmax(1)


def marginals(batch: dict[str, np.ndarray], config: mqar.MQARConfig, exact: np.ndarray) -> dict[str, object]:
  """p-values of the gaps of some pairs, of keys, of values and of filler, and the ranges of the last three."""
  count, slots = exact.shape
  vocab, half = config.vocab_size, config.vocab_size // 2
  keys, values = batch["tokens"][:, 0 : 2 * count : 2], batch["tokens"][:, 1 : 2 * count : 2]
  filler = batch["tokens"][:, 2 * count :][batch["weights"][:, 2 * count :] == 0]

  def uniform(x: np.ndarray, first: int, end: int) -> float:
    return chi_square(np.bincount(x - first, minlength=end - first), np.ones(end - first))

  result = {
    f"gap of pair {j + 1}": chi_square(np.bincount(batch["gaps"][:, j], minlength=slots), exact[j])
    for j in sorted({0, 1, count // 2, count - 1})
  }
  result |= {
    "first key": uniform(keys[:, 0], 1, half),
    "last key": uniform(keys[:, -1], 1, half),
    "first value": uniform(values[:, 0], half, vocab),
    "last value": uniform(values[:, -1], half, vocab),
    "filler": uniform(filler, 0, vocab),
  }
  ranges = {name: [int(x.min()), int(x.max())] for name, x in (("keys", keys), ("values", values), ("filler", filler))}
  return {"p": result, "range": ranges}


def plot(results: list[dict], path: str) -> None:
  """Draws measured and defined gaps of three pairs, a panel per size."""
  figure, axes = pyplot.subplots(1, len(results), figsize=(4 * len(results), 3.2), layout="constrained")
  for axis, result in zip(axes, results, strict=True):
    slots = np.arange(1, result["exact"].shape[1] + 1)
    for j, colour in ((0, "C0"), (1, "C1"), (len(result["exact"]) - 1, "C2")):
      measured = np.bincount(result["gaps"][:, j], minlength=len(slots)) / len(result["gaps"])
      axis.plot(slots, measured, ".", color=colour, markersize=3)
      axis.plot(slots, result["exact"][j], color=colour, linewidth=1, label=f"pair {j + 1}")
    axis.set(xscale="log", yscale="log", ylim=(1e-4, 1), xlabel="gap (slots of two tokens)")
    axis.set_title(f"length {result['length']}, {result['pairs']} pairs", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
  axes[0].set_ylabel("probability (dots: rows; lines: definition)")
  figure.savefig(path, dpi=110)


def main(_) -> None:
  """Compares every size, prints the p-values, and writes JSON and a plot."""
  results = []
  for length, pairs in SIZES:
    config = mqar.MQARConfig(pairs=(pairs,))
    batch = sample(config, length, _ROWS.value, _SEED.value)
    exact = draws(power_law((length - 2 * pairs) // 2, config.power_a), pairs)
    compared = marginals(batch, config, exact)
    results.append({"length": length, "pairs": pairs, **compared, "exact": exact, "gaps": batch["gaps"]})
    print(length, pairs, json.dumps(compared))
  plot(results, f"{_OUT.value}.png")
  kept = [{name: x for name, x in result.items() if name not in ("exact", "gaps")} for result in results]
  with open(f"{_OUT.value}.json", "w") as file:
    json.dump({"rows": _ROWS.value, "seed": _SEED.value, "sizes": kept}, file, indent=1)


if __name__ == "__main__":
  flags.mark_flag_as_required("out")
  cli.run(main)
