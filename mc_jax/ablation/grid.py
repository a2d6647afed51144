"""A grid of training runs: every combination of several fields' values, from several seeds."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import re
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from mc_jax import cli
from mc_jax.errors import ConfigError, listed
from mc_jax.training import config as config_lib
from mc_jax.training.config import Config


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of the grid.

  Attributes:
    number: Index in the grid, from 0. All cells of the first seed come first.
    name: Name of the cell's folder, "rule=linear,aggregation=grm,seed=0".
    values: The values of the grid's fields, under the shortest unambiguous names: {"rule": "linear"}.
    seed: Seed of the parameters and the data.
    arguments: Arguments of mc_jax.train except --workdir.
    config: The configuration that results from the arguments.
  """

  number: int
  name: str
  values: dict[str, str]
  seed: int
  arguments: tuple[str, ...]
  config: Config


def cells(arguments: Sequence[str], axes: Sequence[str], seeds: int = 1) -> list[Cell]:
  """The cells of a grid, each with a configuration that passed the trainer's checks.

  Args:
    arguments: The arguments of mc_jax.train that all cells share: --config=FILE and --config.FIELD=VALUE.
    axes: FIELD=VALUE,VALUE,... each; commas within brackets belong to a value.
    seeds: The number of seeds for every combination. The first is the configuration's train.seed and data.seed; the
      others add 1, 2, ... to them.

  Raises:
    ConfigError: A field that does not exist, with the nearest name; a value that cannot work, and the cells it is in.
  """
  base, grid = read(arguments), _grid(axes, arguments)
  valid, problems = [], {}
  for number, (seed, *values) in enumerate(itertools.product(range(seeds), *grid.values())):
    seed += base.train.seed
    fields = dict(zip(grid, values, strict=True))
    seeded = fields | {"train.seed": seed, "data.seed": seed - base.train.seed + base.data.seed}
    line = [*arguments, *(f"--config.{field}={value}" for field, value in seeded.items())]
    short = {short_name(field): value for field, value in fields.items()}
    name = ",".join(f"{field}={_as_file_name(str(value))}" for field, value in (short | {"seed": seed}).items())
    try:
      config = read(line).check()
      valid.append(Cell(number, name, short, seed, tuple(line), config))
    except ConfigError as error:
      for problem in str(error).splitlines():
        problems.setdefault(problem, []).append(name)
  if problems:
    lines = [f"{line} ({in_cells(cells)})" for line, cells in problems.items()]
    raise ConfigError("\n".join(lines))
  if twice := [name for name, count in collections.Counter(cell.name for cell in valid).items() if count > 1]:
    raise ConfigError(f"--grid: two cells would be called {twice[0]}; give values that differ in letters or numbers")
  return valid


def config_arguments(argv: Sequence[str], config: Config | None) -> list[str]:
  """The arguments of a command line that configure all cells: --config=FILE and --config.FIELD=VALUE.

  Args:
    argv: The command line without the program's name.
    config: What absl parsed from it; None if there was no --config.

  Raises:
    ConfigError: --config is missing, or an argument has a form that cannot be passed on.
  """
  if config is None:
    raise ConfigError("--config=FILE is missing, the configuration of all cells, such as configs/mqar.py")
  arguments = [argument for argument in cli.expanded(list(argv)) if re.match(r"--?(no)?config[.=]", argument)]
  with contextlib.suppress(ConfigError):  # absl parsed the whole command line, so `arguments` are not all of it
    if read(arguments) == config:
      return arguments
  raise ConfigError("the configuration must be given as --config=FILE and --config.FIELD=VALUE, each one argument")


def read(arguments: Sequence[str]) -> Config:
  """The configuration that mc_jax.train reads from these arguments, unchecked.

  Raises:
    ConfigError: A file or field that does not exist, or a value of the wrong type.
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


# Groups whose fields take no short name from another: folders of cells were called by those names before.
_LATER = ("data.facts.", "model.product_keys.", "optimizer.memory_values.")


def short_name(field: str) -> str:
  """The shortest suffix of a field's name that no other field has: "rule", "model.vocab_size"."""
  parts = field.split(".")
  later = field.startswith(_LATER)
  names = [f".{name}" for name in config_lib.fields(Config()) if later or not name.startswith(_LATER)]
  ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
  return next((end for end in ends if sum(name.endswith(f".{end}") for name in names) < 2), field)


def in_cells(names: Sequence[str]) -> str:
  """Cells by the name of the first: "in rule=linear,seed=0 and 3 more"."""
  return f"in {listed(names, 1)}"


def _grid(axes: Sequence[str], arguments: Sequence[str]) -> dict[str, list[str]]:
  """{field: values}; the fields are checked, the values are not."""
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
      raise ConfigError(f"--grid={axis}: use --seeds instead")
    if field in grid or any(argument.lstrip("-").startswith(f"config.{field}=") for argument in arguments):
      raise ConfigError(f"--grid={axis}: {field} is given twice")
    if len(set(values)) < len(values):
      raise ConfigError(f"--grid={axis}: a value is given twice")
    grid[field] = values
  return grid


def _as_file_name(value: str) -> str:
  """A value in the form it has in a folder's name: (2, 4) as 2+4."""
  return re.sub(r"[^\w.+-]+", "-", re.sub(r"[()\[\]'\" ]", "", value).replace(",", "+").rstrip("+"))
