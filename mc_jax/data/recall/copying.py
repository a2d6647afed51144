"""Copying of random strings, as in "Repeat After Me" (arXiv:2402.01032).

    BEGIN s1 s2 .. sn SEPARATOR s1 s2 .. sn END, one after the other as long as a row has room, then PADDING

Letters are uniform, lengths uniform from `shortest` to `longest`; the letters of the copies count.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mc_jax.errors import ConfigError

PADDING, BEGIN, SEPARATOR, END = range(4)
_SPECIAL = 4  # the first letter


@dataclasses.dataclass(frozen=True)
class CopyingConfig:
  """The published task's letters and lengths; equal lengths for one long string, `shortest = longest`."""

  letters: int = 26  # of the alphabet that strings are made of
  shortest: int = 20  # letters of a string
  longest: int = 50

  @property
  def vocab_size(self) -> int:
    """Ids: four signs, then the letters."""
    return _SPECIAL + self.letters

  def problems(self, prefix: str = "copying", length: int | None = None) -> list[str]:
    """Every setting that cannot work, one line each; with `length`, also what rows of that many tokens cannot hold."""
    found = []
    if self.letters < 1:
      found.append(f"{prefix}.letters must be at least 1, got {self.letters!r}")
    if self.shortest < 1:
      found.append(f"{prefix}.shortest must be at least 1, got {self.shortest!r}")
    if self.longest < self.shortest:
      found.append(f"{prefix}.longest must be at least {prefix}.shortest={self.shortest}, got {self.longest!r}")
    elif length is not None and length < 2 * self.longest + 2:
      found.append(
        f"data.length must be at least {2 * self.longest + 2} for strings of {prefix}.longest={self.longest}, got "
        f"{length}: or use a longest of at most {max(0, length // 2 - 1)}"
      )
    return found


def row(config: CopyingConfig, length: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """One row: tokens int32, targets int32 (the token after each), weights float32, [length] each.

  Raises:
    ConfigError: what `CopyingConfig.problems` lists.
  """
  if found := config.problems(length=length):
    raise ConfigError("\n".join(found))
  ids = np.full(length + 1, PADDING, np.int32)
  copied = np.zeros(length + 1, np.float32)
  start = 0
  while start + 2 * (n := int(rng.integers(config.shortest, config.longest + 1))) + 3 <= len(ids):
    string = _SPECIAL + rng.integers(config.letters, size=n)
    copy = start + n + 2
    ids[start : copy + n + 1] = np.concatenate([[BEGIN], string, [SEPARATOR], string, [END]])
    copied[copy : copy + n] = 1
    start = copy + n + 1
  return {"tokens": ids[:-1], "targets": ids[1:], "weights": copied[1:]}
