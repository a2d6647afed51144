"""Facts of one fixed world: what a model has to know because no row says it.

    tokens   n1 n2 a v | n1 n2 a v | ..      (length / 4 facts, all different; with names of two ids)
    targets  at each a: the fact's value v; that target counts, all others do not

A world consists of entities, each with a name of a few ids, and attributes, one id each. Every pair of the two is a
fact, whose value is drawn once, uniformly. A row states facts of the world, drawn anew for each row, and no fact twice:
its values are known from other rows or not at all. Accuracy thus measures what the parameters remember, as the bits of
knowledge of arXiv:2404.05405 do (see evaluation/recall.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from mc_jax.errors import ConfigError

PADDING = 0  # fills the end of a row; ids of names begin after it


@dataclasses.dataclass(frozen=True)
class FactsConfig:
  """The world, and how it is written."""

  count: int = 16_384  # facts in the world
  attributes: int = 4  # facts of an entity (the last one may have fewer)
  value_ids: int = 64  # ids that values are drawn from
  name_ids: int = 128  # ids that names are written in
  name_length: int = 2  # ids of a name
  world: int = 0  # seed of the names and values; rows are drawn from data.seed, so that other rows tell of one world

  @property
  def vocab_size(self) -> int:
    """Ids: padding, then those of names, attributes and values."""
    return 1 + self.name_ids + self.attributes + self.value_ids

  @property
  def entities(self) -> int:
    """The number of entities that the facts are of."""
    return -(-self.count // self.attributes)

  @property
  def tokens(self) -> int:
    """Tokens of a fact: the name, the attribute, the value."""
    return self.name_length + 2

  def problems(self, prefix: str = "facts", length: int | None = None) -> list[str]:
    """Every setting that cannot work, one line each; with `length`, also what rows of that many tokens cannot hold."""
    found = [
      f"{prefix}.{field} must be at least {least}, got {getattr(self, field)!r}"
      for field, least in {"count": 1, "attributes": 1, "value_ids": 2, "name_ids": 1, "name_length": 1}.items()
      if getattr(self, field) < least
    ]
    if not 0 <= self.world < 2**32:
      found.append(f"{prefix}.world must be between 0 and 2**32 - 1, got {self.world!r}")
    if found:
      return found
    names = self.name_ids**self.name_length
    if self.entities > names:
      found.append(
        f"{prefix}.count={self.count} needs {self.entities} names, {prefix}.name_ids={self.name_ids} and "
        f"{prefix}.name_length={self.name_length} make {names}: use at most {names * self.attributes} facts, or longer "
        "names"
      )
    if length is not None and length < self.tokens:
      found.append(f"data.length must be at least {self.tokens}, the tokens of a fact, got {length}")
    return found


@functools.lru_cache(maxsize=4)
def world(config: FactsConfig) -> np.ndarray:
  """All facts as they are written: int32 [count, name_length + 2], the ids of the name, of the attribute, of the value.

  Fact f is of entity f // attributes. No two entities have the same name.
  """
  rng = np.random.default_rng(config.world)
  numbers = rng.choice(config.name_ids**config.name_length, config.entities, replace=False)
  digits = numbers[:, None] // config.name_ids ** np.arange(config.name_length) % config.name_ids
  entity, attribute = np.divmod(np.arange(config.count), config.attributes)
  first = 1 + config.name_ids  # of the attributes
  values = first + config.attributes + rng.integers(config.value_ids, size=config.count)
  facts = np.column_stack([1 + digits[entity], first + attribute, values]).astype(np.int32)
  facts.flags.writeable = False  # all callers share it
  return facts


def row(config: FactsConfig, length: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """One row of as many facts as fit: tokens int32, targets int32, weights float32, [length] each.

  A world of fewer facts than that fills only the beginning.

  Raises:
    ConfigError: what `FactsConfig.problems` lists.
  """
  if found := config.problems(length=length):
    raise ConfigError("\n".join(found))
  stated = min(length // config.tokens, config.count)
  return stating(config, length, rng.choice(config.count, stated, replace=False))


def stating(config: FactsConfig, length: int, chosen: Sequence[int]) -> dict[str, np.ndarray]:
  """The row that states the facts of these numbers, as `row` does; `length` holds them."""
  facts = world(config)[np.asarray(chosen, int)]
  tokens = np.full(length, PADDING, np.int32)
  tokens[: facts.size] = facts.ravel()
  weights = np.zeros(length, np.float32)
  weights[config.tokens - 2 : facts.size : config.tokens] = 1  # the attribute's place: its target is the value
  return {"tokens": tokens, "targets": np.append(tokens[1:], PADDING).astype(np.int32), "weights": weights}
