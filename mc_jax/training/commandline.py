"""The flag --config of the doors; what is mistyped becomes a ConfigError."""

from __future__ import annotations

import sys

from absl import flags
from ml_collections import config_flags

from mc_jax import console
from mc_jax.data import files
from mc_jax.errors import ConfigError
from mc_jax.training import config


def define_config() -> flags.FlagHolder:
  """Defines --config, a file such as configs/quickstart.py, whose fields are flags: --config.train.steps=100."""
  text = "the run: a file such as configs/quickstart.py"
  return config_flags.DEFINE_config_file("config", None, text, lock_config=True)


def define_overrides() -> flags.FlagHolder:
  """Defines --config.FIELD=VALUE alone, for doors that take a --workdir: fields that differ from those of its run."""

  def known(argument: str) -> bool:  # absl looks for the others at once, where nobody can answer; `parse` tells of them
    field = argument.lstrip("-").removeprefix("no").removeprefix("config.").partition("=")[0]
    return field in tree

  tree = config.fields(config.Config())
  text = "changes a field of the run's configuration: --config.data.length=2048"
  return config_flags.DEFINE_config_dict("config", config.default(), text, sys_argv=list(filter(known, sys.argv)))


def overrides(holder: flags.FlagHolder) -> dict[str, object]:
  """The fields that the command line gives, {"data.length": 2048}, for trained.load."""
  return config_flags.get_override_values(flags.FLAGS[holder.name])


def parse(holder: flags.FlagHolder, argv: list[str]) -> list[str]:
  """absl's parsing.

  Raises:
    ConfigError: a wrong field, value or config file, or an argument that is not a flag.
  """
  for argument in argv[1:]:
    name = argument.lstrip("-").partition("=")[0]
    if name.startswith("config."):
      config.require_field(name.removeprefix("config."))
    elif name == "config" and holder.default is not None:
      raise ConfigError("--config=FILE is for training; here the run's own is read from --workdir=RUN")
  try:
    rest = console.parse_arguments(expanded(argv), [f"config.{field}" for field in config.fields(config.Config())])
  except KeyError as error:  # a name in data.sources that the config file does not have
    raise ConfigError(" ".join(str(error.args[0]).split())) from error
  try:
    if holder.value is not None:
      holder.value.lock()
  except OSError as error:  # what absl kept back when it could not load the file
    raise ConfigError(f"--config: {error}") from error
  if len(rest) > 1:
    raise ConfigError(f"not a flag: {' '.join(rest[1:])}; write --config.train.steps=100")
  return rest


def numbers(flag: flags.FlagHolder) -> tuple[int, ...]:
  """The whole numbers of a list, or ConfigError."""
  try:
    return tuple(int(text) for text in flag.value)
  except ValueError as error:
    raise ConfigError(f"--{flag.name} must be numbers separated by commas, got {','.join(flag.value)}") from error


def expanded(arguments: list[str]) -> list[str]:
  """The arguments with --config=~/FILE as --config=HOME/FILE, which no shell does."""
  return [
    f"{flag}={files.path(value)}" if flag.lstrip("-") == "config" and value.startswith("~") else argument
    for argument, (flag, _, value) in ((argument, argument.partition("=")) for argument in arguments)
  ]
