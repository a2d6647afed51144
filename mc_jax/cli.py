"""The command line of every program of this package: flags, configuration, standard streams, one-line errors, statuses.

Status 1 means that something outside failed, 2 that the same command would end the same way, and 128 + N that signal N
ended it.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import functools
import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from mc_jax import storage
from mc_jax.errors import ConfigError

flags.disclaim_key_flags()  # flags defined below belong to the programs that define them

_ACCESS = (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)  # of standard input, output and error


def run(
  main: Callable[[list[str]], None],
  config: flags.FlagHolder | None = None,
  *,
  parse: Callable[[list[str]], list[str]] | None = None,
  verbosity: int | None = None,
  outlives_output: bool = False,
  hopeless: tuple[type[Exception], ...] = (),
  interrupted: str = "stopped",
) -> NoReturn:
  """Runs a program and exits, with usable standard streams.

  Args:
    main: Takes the arguments that are not flags, the program's name first.
    config: The flag of `config_flag` or `overrides_flag`, for a program that has one.
    parse: Takes the command line and returns those arguments; default: `parse_config` where there is a `config`, else
      `parse_flags`.
    verbosity: Level of absl's log, unless the user gives --verbosity; default: absl's own.
    outlives_output: The results are files, so the program continues when nobody reads its output any more. Other
      programs then end quietly, as `generate | head -1` should.
    hopeless: Exceptions after which, as after ConfigError, the same command would end the same way.
    interrupted: What to print after Ctrl-C.
  """

  def start(argv: list[str]) -> None:
    if verbosity is not None and not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(verbosity)
    main(argv)

  parse = parse or (parse_flags if config is None else functools.partial(parse_config, config))
  _open_streams(outlives_output)
  try:
    try:
      app.run(start, flags_parser=parse)
    finally:
      sys.stdout.flush()
  except _NobodyReads:
    _end(128 + signal.SIGPIPE)
  except (ConfigError, *hopeless) as error:
    _end(2, f"error: {error}")
  except OSError as error:
    _end(1, f"error: {error}")
  except KeyboardInterrupt as error:
    _end(128 + (error.args[0] if error.args else signal.SIGINT), f"\n{interrupted}")


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parsing, for a program that takes flags alone.

  Raises:
    ConfigError: An unknown flag or a wrong value, or an argument that is not a flag.
  """
  rest = parse_arguments(argv)
  if len(rest) > 1:
    raise ConfigError(f"not a flag: {' '.join(rest[1:])}")
  return rest


def parse_arguments(argv: list[str], fields: Iterable[str] = ()) -> list[str]:
  """absl's parsing, for a program that takes other arguments as well: they are returned.

  Args:
    argv: The command line.
    fields: Names of the configuration's fields, which are flags too: "config.train.steps".

  Raises:
    ConfigError: An unknown flag, with the program's own that is nearest to it, or a wrong value.
  """
  try:
    return flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    near = " or ".join(f"--{name}" for name in _near(error.flagname, fields))
    hint = f"did you mean {near}?" if near else "--help lists all flags"
    raise ConfigError(f"there is no flag --{error.flagname}; {hint}") from error
  except flags.Error as error:
    raise ConfigError(" ".join(str(error).split())) from error


def parse_config(holder: flags.FlagHolder, argv: list[str]) -> list[str]:
  """absl's parsing, for a program whose flags are also the fields of a configuration.

  Args:
    holder: The flag of `config_flag` or `overrides_flag`.
    argv: The command line.

  Raises:
    ConfigError: A wrong field, value or config file, or an argument that is not a flag.
  """
  from mc_jax.training import config  # here, because programs without a configuration need no models

  for argument in argv[1:]:
    name = argument.lstrip("-").partition("=")[0]
    if name.startswith("config."):
      config.require_field(name.removeprefix("config."))
    elif name == "config" and holder.default is not None:
      raise ConfigError("--config=FILE is for training; here the configuration is read from --workdir=RUN")
  try:
    rest = parse_arguments(expanded(argv), [f"config.{field}" for field in config.fields(config.Config())])
  except KeyError as error:  # a name in data.sources that the config file does not have
    raise ConfigError(" ".join(str(error.args[0]).split())) from error
  except AttributeError as error:  # a field that the config file sets and that does not exist
    if why := config.replaced(str(error)):
      raise ConfigError(f"--config: {why}") from error
    raise
  try:
    if holder.value is not None:
      holder.value.lock()
  except OSError as error:  # absl delays this error when it cannot load the file
    raise ConfigError(f"--config: {error}") from error
  if len(rest) > 1:
    raise ConfigError(f"not a flag: {' '.join(rest[1:])}; write --config.train.steps=100")
  return rest


def config_flag() -> flags.FlagHolder:
  """Defines --config, a file such as configs/quickstart.py, whose fields are flags: --config.train.steps=100."""
  text = "Configuration file of the run, such as configs/quickstart.py."
  return config_flags.DEFINE_config_file("config", None, text, lock_config=True)


def overrides_flag() -> flags.FlagHolder:
  """Defines --config.FIELD=VALUE alone, for programs that take a --workdir: changes to the configuration of its run."""
  from mc_jax.training import config

  def known(argument: str) -> bool:
    """Whether absl can parse it now: its errors would not be caught here, while parse_config reports them."""
    field = argument.lstrip("-").removeprefix("no").removeprefix("config.").partition("=")[0]
    return field in tree

  tree = config.fields(config.Config())
  text = "Changes a field of the run's configuration: --config.data.length=2048."
  return config_flags.DEFINE_config_dict("config", config.default(), text, sys_argv=list(filter(known, sys.argv)))


def overrides(holder: flags.FlagHolder) -> dict[str, object]:
  """The fields that the command line gives, {"data.length": 2048}, for trained.load."""
  return config_flags.get_override_values(flags.FLAGS[holder.name])


def expanded(arguments: list[str]) -> list[str]:
  """The arguments with --config=~/FILE as --config=HOME/FILE, which shells do not expand."""
  return [
    f"{flag}={storage.path(value)}" if flag.lstrip("-") == "config" and value.startswith("~") else argument
    for argument, (flag, _, value) in ((argument, argument.partition("=")) for argument in arguments)
  ]


def path_flag(name: str, default: str | None, text: str, *, written: bool = False) -> flags.FlagHolder[str | None]:
  """Defines a flag that takes a path, in which ~ stands for the home folder; an empty value is refused.

  Args:
    name: The flag's name.
    default: Its default.
    text: Its help.
    written: The program writes this file at its end, so its folder must exist at the start.
  """
  return flags.DEFINE(_Path(written), name, default, text, serializer=flags.ArgumentSerializer())


def numbers_flag(name: str, default: list[int], text: str, least: int | None = None) -> flags.FlagHolder[list[int]]:
  """Defines a flag that takes whole numbers separated by commas.

  Args:
    name: The flag's name.
    default: Its default.
    text: Its help.
    least: The smallest number that is allowed; default: any.
  """
  return flags.DEFINE(_Numbers(least), name, default, text, serializer=flags.ListSerializer(","))


def json_flag() -> flags.FlagHolder[str | None]:
  """Defines --json, a file for the program's figures; see `write_json`."""
  return path_flag("json", None, "Also write the figures to this file.", written=True)


def write_json(path: str | None, record: Mapping[str, object]) -> None:
  """Writes a record to the file of `json_flag`, if there is one."""
  if path:
    storage.write(path, json.dumps(record, indent=1) + "\n")


def command(door: str) -> str:
  """The command line that started this program, quoted for a shell.

  Args:
    door: The program's name, "evaluate" for mc_jax.evaluate.
  """
  return shlex.join(["python", "-m", f"mc_jax.{door}", *sys.argv[1:]])


def typed(name: str, text: str) -> str:
  """A flag's text as UTF-8, whatever the locale it was read in.

  Raises:
    ConfigError: It is not UTF-8.
  """
  try:
    return os.fsencode(text).decode("utf-8")
  except UnicodeError as error:
    raise ConfigError(f"--{name} is not UTF-8: {error}") from error


@contextlib.contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
  """Renames fields in ConfigErrors of its block: "--paths" for "data.paths" with names={"data.paths": "--paths"}.

  For programs whose flags are not the fields of a configuration.
  """
  try:
    yield
  except ConfigError as error:
    known = rf"(?<![\w./-])(?:{'|'.join(map(re.escape, names))})(?![\w/]|\.\w)"  # no part of a file's name
    raise ConfigError(re.sub(known, lambda match: names[match[0]], str(error))) from error


def silence() -> None:
  """Discards standard output from now on."""
  sys.stdout.flush()
  _discard(1)


def _near(name: str, fields: Iterable[str]) -> list[str]:
  """The flag of this program nearest to `name`, and the fields of a configuration of that name."""
  modules = flags.FLAGS.flags_by_module_dict().items()
  names = [flag.name for module, flags_ in modules if module == sys.argv[0] or "mc_jax" in module for flag in flags_]
  return difflib.get_close_matches(name, names, n=1) + [field for field in fields if field.split(".")[-1] == name][:3]


class _Path(flags.ArgumentParser):
  """Parses a path."""

  def __init__(self, written: bool):
    super().__init__()
    self._written = written

  def parse(self, argument: str) -> str:
    if not argument.strip():
      raise ValueError("the path is empty (an unset variable?)")
    path = storage.path(argument)
    if self._written and not path.parent.is_dir():
      raise ValueError(f"there is no folder {path.parent} to write it in")
    if self._written and path.is_dir():
      raise ValueError("it is a folder; give a file")
    return str(path)


class _Numbers(flags.ArgumentParser):
  """Parses whole numbers."""

  def __init__(self, least: int | None):
    super().__init__()
    self._least = least

  def parse(self, argument: str | list[int]) -> list[int]:
    if isinstance(argument, list):  # the default
      return argument
    bound = "" if self._least is None else f" of at least {self._least}"
    try:
      numbers = [int(text) for text in argument.split(",")] if argument.strip() else []
    except ValueError as error:
      raise ValueError(f"must be whole numbers{bound}, separated by commas") from error
    if self._least is not None and any(number < self._least for number in numbers):
      raise ValueError(f"must be whole numbers{bound}, separated by commas")
    return numbers


class _NobodyReads(BrokenPipeError):
  """The reader of standard output has gone, and output is all that the program is for."""


class _Output(io.FileIO):
  """Standard output or error.

  If the output is `required`, the first failure to write it is raised. All others are ignored: a closed terminal or
  pipe ends nothing.
  """

  def __init__(self, descriptor: int, required: bool):
    super().__init__(descriptor, "w", closefd=False)
    self._required = required

  def write(self, data: bytes | memoryview) -> int | None:
    try:
      return super().write(data)
    except OSError as error:
      if self._required and error.errno != errno.EIO:  # EIO: the terminal has closed
        self._required = False
        if error.errno == errno.EPIPE:
          raise _NobodyReads(*error.args) from error
        raise
      return memoryview(data).nbytes


def _open_streams(outlives_output: bool) -> None:
  """Makes all three standard streams usable.

  One that is closed, or open in the wrong direction, becomes /dev/null before another file can get its number. Input is
  UTF-8. Output keeps its encoding; characters that it lacks are printed as escapes.
  """
  for descriptor, access in enumerate(_ACCESS):
    if not _is_open(descriptor, access):
      _discard(descriptor)
  sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8", "strict")
  sys.stdout = sys.__stdout__ = _text(sys.stdout, _Output(1, required=not outlives_output))
  sys.stderr = sys.__stderr__ = _text(sys.stderr, _Output(2, required=False), line_buffering=True)


def _text(old: io.TextIOWrapper | None, raw: _Output, line_buffering: bool = False) -> io.TextIOWrapper:
  """The text stream that replaces Python's own."""
  unbuffered = old is not None and old.write_through  # python -u
  return io.TextIOWrapper(
    raw if unbuffered else io.BufferedWriter(raw),
    "utf-8" if old is None else old.encoding,
    "backslashreplace",
    line_buffering=line_buffering or raw.isatty(),
    write_through=unbuffered,
  )


def _is_open(descriptor: int, access: int) -> bool:
  try:
    mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
  except OSError:
    return False
  return mode in (access, os.O_RDWR)


def _discard(descriptor: int) -> None:
  """Makes /dev/null of a descriptor, open or not."""
  null = os.open(os.devnull, os.O_RDWR)
  os.dup2(null, descriptor)  # without effect if they are the same
  if null != descriptor:
    os.close(null)
  os.set_inheritable(descriptor, True)


def _end(status: int, text: str = "") -> NoReturn:
  if text:
    print(text, file=sys.stderr)
  sys.exit(status)
