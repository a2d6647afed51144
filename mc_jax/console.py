"""How every program of this package starts and ends: standard streams that cannot fail it, one-line errors, statuses.

Status 1 means that something outside failed, 2 that the same command would end the same way, and 128 + N that signal N
ended it.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NoReturn

from absl import app, flags

from mc_jax.errors import ConfigError

flags.disclaim_key_flags()  # flags defined below belong to the programs that ask for them

_ACCESS = (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)  # of standard input, output and error


def run(
  main: Callable[[list[str]], None],
  parse: Callable[[list[str]], list[str]] | None = None,
  *,
  outlives_output: bool = False,
  hopeless: tuple[type[Exception], ...] = (),
  interrupted: str = "stopped",
) -> NoReturn:
  """Runs a program to its end, whatever its standard streams are.

  Args:
    main: Takes the arguments that are not flags, the program's name first.
    parse: Takes the command line and returns those arguments; default: `parse_flags`.
    outlives_output: The results are files, so the program continues when nobody reads its output any more. Others end
      quietly then, as `generate | head -1` should.
    hopeless: Exceptions after which, as after ConfigError, the same command would end the same way.
    interrupted: What to print after Ctrl-C.
  """
  _open_streams(outlives_output)
  try:
    try:
      app.run(main, flags_parser=parse or parse_flags)
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
    hint = f"did you mean {near}?" if near else "--help lists those there are"
    raise ConfigError(f"there is no flag --{error.flagname}; {hint}") from error
  except flags.Error as error:
    raise ConfigError(" ".join(str(error).split())) from error


def path_flag(name: str, default: str | None, text: str, *, written: bool = False) -> flags.FlagHolder[str | None]:
  """Defines a flag that takes a path, in which ~ stands for the home folder; an empty value is refused.

  Args:
    name: The flag's name.
    default: Its default.
    text: Its help.
    written: The program writes this file at its end, so its folder must exist at the start.
  """
  return flags.DEFINE(_Path(written), name, default, text, serializer=flags.ArgumentSerializer())


def typed(name: str, text: str) -> str:
  """The text that a flag was given, as UTF-8, in which locales it may have been read otherwise.

  Raises:
    ConfigError: It is not UTF-8.
  """
  try:
    return os.fsencode(text).decode("utf-8")
  except UnicodeError as error:
    raise ConfigError(f"--{name} is not UTF-8: {error}") from error


@contextlib.contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
  """Within it, a ConfigError says "--paths" where it would say "data.paths", if `names` has {"data.paths": "--paths"}.

  For programs whose flags are not the fields of a configuration.
  """
  try:
    yield
  except ConfigError as error:
    known = rf"(?<![\w./-])(?:{'|'.join(map(re.escape, names))})(?![\w/]|\.\w)"  # no part of a file's name
    raise ConfigError(re.sub(known, lambda found: names[found[0]], str(error))) from error


def tell(text: str) -> None:
  """Prints a line on standard error, also from a signal's handler, which may have interrupted another print."""
  with contextlib.suppress(OSError):
    os.write(2, f"{text}\n".encode("utf-8", "backslashreplace"))


def silence() -> None:
  """Sends standard output to nowhere from now on."""
  sys.stdout.flush()
  _discard(1)


def _near(name: str, fields: Iterable[str]) -> list[str]:
  """The flag of this program that `name` is most like, and the fields of a configuration that are called so."""
  modules = flags.FLAGS.flags_by_module_dict().items()
  own = [flag.name for module, found in modules if module == sys.argv[0] or "mc_jax" in module for flag in found]
  return difflib.get_close_matches(name, own, n=1) + [field for field in fields if field.split(".")[-1] == name][:3]


class _Path(flags.ArgumentParser):
  """Parses a path."""

  def __init__(self, written: bool):
    super().__init__()
    self._written = written

  def parse(self, argument: str) -> str:
    from mc_jax.data import files

    if not argument.strip():
      raise ValueError("the path is empty (an unset variable?)")
    path = files.path(argument)
    if self._written and not path.parent.is_dir():
      raise ValueError(f"there is no folder {path.parent} to write it in")
    if self._written and path.is_dir():
      raise ValueError("it is a folder; give a file")
    return str(path)


class _NobodyReads(BrokenPipeError):
  """The reader of standard output has gone, and output is all that the program is for."""


class _Output(io.FileIO):
  """Standard output or error.

  Where the program lives for its output, the first failure to write it is raised. All others are passed over: a closed
  terminal or pipe ends nothing.
  """

  def __init__(self, descriptor: int, required: bool):
    super().__init__(descriptor, "w", closefd=False)
    self._required = required

  def write(self, data: bytes | memoryview) -> int | None:
    try:
      return super().write(data)
    except OSError as error:
      if self._required and error.errno != errno.EIO:  # EIO is a terminal's that has closed
        self._required = False
        if error.errno == errno.EPIPE:
          raise _NobodyReads(*error.args) from error
        raise
      return memoryview(data).nbytes


def _open_streams(outlives_output: bool) -> None:
  """Makes all three standard streams usable.

  One that is closed, or open the wrong way round, becomes /dev/null, before another file gets its number. Input is
  UTF-8. Output keeps its encoding, and what that lacks is printed as escapes.
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
