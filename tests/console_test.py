"""How every door starts and ends, whatever its standard streams and the locale are."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
POSIX = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # nothing but ASCII, also in names of files
LOCALES = {
  "C": {"LC_ALL": "C"},
  "latin-1": {"PYTHONIOENCODING": "latin-1"},
  "ascii": {"PYTHONIOENCODING": "ascii:strict"},
  "POSIX": POSIX,
}

DOOR = """
import sys
from absl import flags
from mc_jax import console

TO = console.path_flag("to", None, "a folder")
JSON = console.path_flag("json", None, "a file", written=True)
WORDS = flags.DEFINE_string("words", "", "a text")
RAISES = flags.DEFINE_string("raises", "", "an error")

def main(argv):
  read = sys.stdin.read()
  if RAISES.value:
    raise {"os": OSError("漢"), "hopeless": ZeroDivisionError("漢"), "interrupt": KeyboardInterrupt()}[RAISES.value]
  text = console.typed("words", WORDS.value)
  with open("seen", "w", encoding="utf-8") as file:
    file.write("|".join([read, text, ascii(TO.value), *argv[1:]]))
  print(f"€漢 {text}" * 1000)
  print("漢", file=sys.stderr)

console.run(main, console.parse_arguments, outlives_output=OUTLIVES, hopeless=(ZeroDivisionError,), interrupted="bye")
"""


@pytest.fixture(scope="module")
def doors(tmp_path_factory):
  """A door that lives for its output, and one that outlives it."""
  folder = tmp_path_factory.mktemp("doors")
  for name, outlives in (("output", False), ("files", True)):
    (folder / f"{name}.py").write_text(DOOR.replace("OUTLIVES", str(outlives)), encoding="utf-8")
  return folder


def _shell(doors, tmp_path, line, **environment):
  """What comes of a shell's line, in which DOOR and FILES are the doors."""
  for name in ("output", "files"):
    line = line.replace(name.upper(), f"'{sys.executable}' '{doors / name}.py'")
  clean = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
  environment = clean | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)} | environment
  return subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, check=False)


@pytest.mark.parametrize("locale", LOCALES)
def test_text_is_utf8_and_what_a_terminal_lacks_is_escaped(doors, tmp_path, locale):
  (tmp_path / "in").write_text("€ 漢\n", encoding="utf-8")
  done = _shell(doors, tmp_path, "OUTPUT --words='漢 €' --to='~/漢' <in", **LOCALES[locale])
  assert done.returncode == 0, done.stderr
  read, text, folder = (tmp_path / "seen").read_text(encoding="utf-8").split("|")
  assert (read, text) == ("€ 漢\n", "漢 €")
  escaped = "".join(f"\\udc{byte:02x}" for byte in "漢".encode()) if locale == "POSIX" else "\\u6f22"
  assert folder == f"'{tmp_path}/{escaped}'"
  printed = "€漢 漢 €" if locale == "C" else "\\u20ac\\u6f22 \\u6f22 \\u20ac"
  assert done.stdout.decode() == printed * 1000 + "\n"
  assert done.stderr.decode() == ("漢\n" if locale == "C" else "\\u6f22\n")


def _seen(doors, tmp_path, line):
  done = _shell(doors, tmp_path, line)
  seen = tmp_path / "seen"
  found = done.returncode, done.stderr.decode(), seen.exists()
  seen.unlink(missing_ok=True)
  return found


def test_streams_that_are_closed_or_the_wrong_way_round_are_empty(doors, tmp_path):
  for streams in ("<&-", "0>/dev/null", "</dev/null >&-", "</dev/null 1</dev/null"):
    assert _seen(doors, tmp_path, f"OUTPUT {streams}") == (0, "漢\n", True), streams
  assert _seen(doors, tmp_path, "OUTPUT <&- >&- 2>&-") == (0, "", True)


def test_output_that_nobody_reads_ends_a_door_that_lives_for_it(doors, tmp_path):
  for line, status, said in (
    ("OUTPUT </dev/null | true; exit ${PIPESTATUS[0]}", 141, "漢\n"),
    ("FILES </dev/null | true; exit ${PIPESTATUS[0]}", 0, "漢\n"),
    ("OUTPUT </dev/null >/dev/full", 1, "漢\nerror: [Errno 28] No space left on device\n"),
    ("FILES </dev/null >/dev/full", 0, "漢\n"),
    ("OUTPUT </dev/null 2>/dev/full", 0, ""),
  ):
    found = _seen(doors, tmp_path, line)
    assert found[::2] == (status, True), line
    assert said.endswith(found[1]), line


@pytest.mark.parametrize(
  ("flags", "status", "said"),
  [
    ("--to=", 2, "error: flag --to=: the path is empty (an unset variable?)\n"),
    ("--json=nowhere/x", 2, "error: flag --json=nowhere/x: there is no folder nowhere to write it in\n"),
    ("--json=.", 2, "error: flag --json=.: it is a folder; give a file\n"),
    ("--wrods=x", 2, "error: there is no flag --wrods; did you mean --words?\n"),
    (r"--words=$'\xff'", 2, "error: --words is not UTF-8: 'utf-8' codec can't decode byte 0xff in position 0: "),
    ("--raises=os", 1, "error: \\u6f22\n"),
    ("--raises=hopeless", 2, "error: \\u6f22\n"),
    ("--raises=interrupt", 130, "\nbye\n"),
  ],
)
def test_errors_are_lines_with_statuses(doors, tmp_path, flags, status, said):
  done = _shell(doors, tmp_path, f"FILES {flags} <&-", PYTHONIOENCODING="ascii")
  assert done.returncode == status
  assert done.stderr.decode().startswith(said)
  assert done.stderr.count(b"\n") <= said.count("\n") + 1
  assert not (tmp_path / "seen").exists()
