"""Multi-query associative recall (MQAR), as Zoology defines it (arXiv:2312.04927).

    tokens   k1 v1 k2 v2 .. kN vN | slot 0, -, slot 1, -, ..      (N pairs, then (length - 2 N) / 2 slots of two tokens)
    targets  at the slot that holds k_i: v_i; that target counts, all others do not

Keys are distinct, uniform over 1 .. V/2 - 1; values distinct, uniform over V/2 .. V - 1. Pair by pair a slot is drawn
among those still free, slot g (from 0) with probability proportional to (g + 1)^(power_a - 1): queries come soon after
the pairs, those of the first pairs soonest. All other places hold filler.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mc_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class MQARConfig:
  """The published task; several numbers of pairs make one stream of rows of each."""

  vocab_size: int = 8192  # ids: 0 is filler, then keys up to the middle, then values
  pairs: tuple[int, ...] = (8,)  # key-value pairs in a row; of several numbers, each row draws one
  power_a: float = 0.01  # of the gaps' power law; 1: uniform gaps
  random_non_queries: bool = True  # filler is random ids of the whole vocabulary; False: 0

  def __post_init__(self):
    object.__setattr__(self, "pairs", tuple(self.pairs))  # JSON has only lists

  def problems(self, prefix: str = "mqar", length: int | None = None) -> list[str]:
    """Every setting that cannot work, one line each; with `length`, also what rows of that many tokens cannot hold."""
    found = []
    most = self.vocab_size // 2 - 1  # distinct keys
    if most < 1:
      found.append(f"{prefix}.vocab_size must be at least 4, got {self.vocab_size!r}")
    if not self.pairs or min(self.pairs) < 1:
      found.append(f"{prefix}.pairs must be one or more numbers of at least 1, got {self.pairs!r}")
    elif max(self.pairs) > most >= 1:
      found.append(
        f"{prefix}.pairs={self.pairs} needs {max(self.pairs)} distinct keys, {prefix}.vocab_size={self.vocab_size} has "
        f"{most}: use at most {most} pairs, or a vocab_size of at least {2 * max(self.pairs) + 2}"
      )
    elif length is not None and (length % 2 or length < 4 * max(self.pairs)):
      found.append(
        f"data.length must be even and at least {4 * max(self.pairs)}, four tokens for each of the pairs of "
        f"{prefix}.pairs={self.pairs}, got {length}"
      )
    if not self.power_a > 0:
      found.append(f"{prefix}.power_a must be positive, got {self.power_a!r}")
    return found


def gap_probabilities(slots: int, power_a: float) -> np.ndarray:
  """Probability of each slot to be the first one drawn, [slots]: proportional to (1 + slot)^(power_a - 1)."""
  p = np.arange(1, slots + 1) ** (power_a - 1.0)
  return p / p.sum()


def row(config: MQARConfig, length: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """One row: tokens int32, targets int32, weights float32, [length] each.

  A target that does not count is the token after, or 0 at the end.

  Raises:
    ConfigError: what `MQARConfig.problems` lists.
  """
  if found := config.problems(length=length):
    raise ConfigError("\n".join(found))
  vocab, half = config.vocab_size, config.vocab_size // 2
  pairs = int(rng.choice(config.pairs))
  keys = 1 + rng.choice(half - 1, pairs, replace=False)
  values = half + rng.choice(vocab - half, pairs, replace=False)
  slots = (length - 2 * pairs) // 2
  # In the order drawn: the i-th slot is the i-th pair's.
  gaps = rng.choice(slots, pairs, replace=False, p=gap_probabilities(slots, config.power_a))
  queries = 2 * pairs + 2 * gaps

  tokens = rng.integers(vocab, size=length) if config.random_non_queries else np.zeros(length, int)
  tokens[0 : 2 * pairs : 2] = keys
  tokens[1 : 2 * pairs : 2] = values
  tokens[queries] = keys
  targets = np.append(tokens[1:], 0)
  targets[queries] = values
  weights = np.zeros(length, np.float32)
  weights[queries] = 1
  return {"tokens": tokens.astype(np.int32), "targets": targets.astype(np.int32), "weights": weights}
