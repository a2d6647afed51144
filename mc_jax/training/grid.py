"""A grid of training runs: every combination of some fields' values, from several seeds."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from mc_jax.errors import ConfigError
from mc_jax.training import config as config_lib
from mc_jax.training.config import Config


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of the grid.

  Attributes:
    number: its place in the grid, from 0: all cells of the first seed come first.
    name: fit for a folder: "rule=linear,aggregation=grm,seed=0".
    values: what the grid says of it, by names as short as they can be: {"rule": "linear", "aggregation": "grm"}.
    seed: of its starting values and of its data.
    arguments: of mc_jax.train, all but --workdir.
    config: that these make.
  """

  number: int
  name: str
  values: dict[str, str]
  seed: int
  arguments: tuple[str, ...]
  config: Config


def cells(arguments: Sequence[str], axes: Sequence[str], seeds: int = 1) -> list[Cell]:
  """The cells, each with a configuration that was checked as the trainer does.

  Args:
    arguments: of mc_jax.train for all of them: --config=FILE and --config.FIELD=VALUE.
    axes: FIELD=VALUE,VALUE,... each; commas within brackets belong to a value.
    seeds: of every combination. The first has the configuration's train.seed and data.seed, the next ones add 1, 2, ...

  Raises:
    ConfigError: a field that does not exist, with the nearest name; a value that cannot work, and in which cells.
  """
  base, grid = read(arguments), _grid(axes, arguments)
  found, problems = [], {}
  for number, (seed, *values) in enumerate(itertools.product(range(seeds), *grid.values())):
    seed += base.train.seed
    own = dict(zip(grid, values, strict=True))
    both = {"train.seed": seed, "data.seed": seed - base.train.seed + base.data.seed}
    line = [*arguments, *(f"--config.{field}={value}" for field, value in (own | both).items())]
    short = {short_name(field): value for field, value in own.items()}
    name = ",".join(f"{field}={_fit(str(value))}" for field, value in (short | {"seed": seed}).items())
    try:
      config = read(line).check()
      found.append(Cell(number, name, short, seed, tuple(line), config))
    except ConfigError as error:
      for problem in str(error).splitlines():
        problems.setdefault(problem, []).append(name)
  if problems:
    lines = [f"{line} ({in_cells(cells)})" for line, cells in problems.items()]
    raise ConfigError("\n".join(lines))
  if twice := [name for name, count in collections.Counter(cell.name for cell in found).items() if count > 1]:
    raise ConfigError(f"--grid: two cells would be called {twice[0]}; give values that differ in letters or numbers")
  return found


def read(arguments: Sequence[str]) -> Config:
  """The configuration that mc_jax.train makes of these arguments, unchecked.

  Raises:
    ConfigError: no such file or field, or a value of another type.
  """
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file(
    "config", None, "", flag_values=values, lock_config=True, sys_argv=list(arguments)
  )
  try:
    values(["mc_jax.train", *arguments])
    return config_lib.from_config_dict(holder.value)
  except (flags.Error, KeyError, OSError) as error:
    raise ConfigError(" ".join(str(error.args[0] if error.args else error).split())) from error


def short_name(field: str) -> str:
  """The shortest end of a field's name that no other field has: "rule", "model.vocab_size"."""
  parts = field.split(".")
  names = [f".{name}" for name in config_lib.fields(Config())]
  ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
  return next((end for end in ends if sum(name.endswith(f".{end}") for name in names) < 2), field)


def in_cells(names: Sequence[str]) -> str:
  """Where something is so, by the first: "in rule=linear,seed=0 and 3 more"."""
  return f"in {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _grid(axes: Sequence[str], arguments: Sequence[str]) -> dict[str, list[str]]:
  """{field: values}, checked but for the values."""
  grid = {}
  for axis in axes:
    field, _, text = axis.partition("=")
    values = [value.strip() for value in re.split(r",(?![^(\[]*[)\]])", text)]
    if not all(values):
      raise ConfigError(f"--grid must be FIELD=VALUE,VALUE,... such as model.memory.rule=linear,titans; got {axis}")
    try:
      config_lib.require_field(field)
      if not field.startswith("data.sources."):
        config_lib.replace(Config(), {field: config_lib.fields(Config()).get(field)})  # refuses groups of fields
    except ConfigError as error:
      raise ConfigError(f"--grid={axis}: {error}") from error
    if field in ("train.seed", "data.seed"):
      raise ConfigError(f"--grid={axis}: seeds are what --seeds is for")
    if field in grid or any(argument.lstrip("-").startswith(f"config.{field}=") for argument in arguments):
      raise ConfigError(f"--grid={axis}: {field} is given twice")
    if len(set(values)) < len(values):
      raise ConfigError(f"--grid={axis}: a value is given twice")
    grid[field] = values
  return grid


def _fit(value: str) -> str:
  """A value as a part of a folder's name: (2, 4) as 2+4."""
  return re.sub(r"[^\w.+-]+", "-", re.sub(r"[()\[\]'\" ]", "", value).replace(",", "+").rstrip("+"))
