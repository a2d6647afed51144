"""What MQAR's definition (arXiv:2312.04927) says of its marginals, computed from its formulas, and how rows compare.

    python tests/data/recall/mqar_statistics.py --out docs/recall/mqar

measures rows of the generator in the paper's sizes against the formulas: OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from scipy import stats

from mc_jax.data.recall import mqar

SIZES = ((64, 4), (128, 8), (256, 16), (512, 64))  # (length, pairs)


def power_law(slots: int, power_a: float) -> np.ndarray:
  """p(g) = a g^(a - 1) / sum, for g = 1 .. slots: [slots]."""
  gaps = np.arange(1, slots + 1, dtype=float)
  density = power_a * gaps ** (power_a - 1)
  return density / density.sum()


def draws(p: np.ndarray, count: int, nodes: int = 400) -> np.ndarray:
  """P(the j-th draw without replacement is slot s), [count, slots], exactly up to the quadrature.

  Drawing one by one among what is left, with probabilities proportional to p, is the order in which clocks ring that
  ring at rates p. Slot s is the j-th to ring (j from 0) with probability

      integral over time t of p_s exp(-p_s t) P(exactly j of the others rang before t) dt,

  the count of the others being a sum of independent Bernoulli variables of 1 - exp(-p_i t). With u = exp(-t), and rates
  in units of the smallest, the integrand is smooth on [0, 1].
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
  """p-value of `counts` under `probabilities`; neighbours that are expected less than 10 times together are one bin."""
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
  """`rows` rows: tokens, targets, weights [rows, length], and gaps [rows, pairs], the slot of each pair's query."""
  drawn = [mqar.row(config, length, np.random.default_rng((seed, i))) for i in range(rows)]
  batch = {name: np.stack([row[name] for row in drawn]) for name in drawn[0]}
  (pairs,) = config.pairs
  return batch | {"gaps": gaps(batch["tokens"], batch["weights"], pairs)}


def gaps(tokens: np.ndarray, weights: np.ndarray, pairs: int) -> np.ndarray:
  """The slot of each pair's query, [rows, pairs]."""
  keys = tokens[:, None, 0 : 2 * pairs : 2]
  rest, asked = tokens[:, 2 * pairs :: 2, None], weights[:, 2 * pairs :: 2, None] == 1
  found = (rest == keys) & asked  # [rows, slots, pairs]
  assert (found.sum(1) == 1).all(), "every key is asked for once"
  return found.argmax(1)


def marginals(batch: dict[str, np.ndarray], config: mqar.MQARConfig, exact: np.ndarray) -> dict[str, object]:
  """p-values of the gaps of the first, the second and the last pair, of keys, of values and of filler; their ranges."""
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


def figure(results: list[dict], path: str) -> None:
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  axes = plt.subplots(1, len(results), figsize=(4 * len(results), 3.2), layout="constrained")[1]
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
  plt.savefig(path, dpi=110)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", required=True, help="path of the .json and .png, without an ending")
  parser.add_argument("--rows", type=int, default=20_000)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  results = []
  for length, pairs in SIZES:
    config = mqar.MQARConfig(pairs=(pairs,))
    batch = sample(config, length, args.rows, args.seed)
    exact = draws(power_law((length - 2 * pairs) // 2, config.power_a), pairs)
    compared = marginals(batch, config, exact)
    results.append({"length": length, "pairs": pairs, **compared, "exact": exact, "gaps": batch["gaps"]})
    print(length, pairs, json.dumps(compared))
  figure(results, f"{args.out}.png")
  kept = [{name: x for name, x in result.items() if name not in ("exact", "gaps")} for result in results]
  with open(f"{args.out}.json", "w") as file:
    json.dump({"rows": args.rows, "seed": args.seed, "sizes": kept}, file, indent=1)


if __name__ == "__main__":
  main()
