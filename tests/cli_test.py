"""How every program starts and ends: its flags, its configuration, its standard streams, in any locale."""

import os
import pathlib
import subprocess
import sys

import pytest

from mc_jax import cli

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
from mc_jax import cli

TO = cli.path_flag("to", None, "a folder")
JSON = cli.path_flag("json", None, "a file", written=True)
WORDS = flags.DEFINE_string("words", "", "a text")
NUMBERS = cli.numbers_flag("numbers", [2, 3], "numbers", least=2)
RAISES = flags.DEFINE_string("raises", "", "an error")

def main(argv):
  read = sys.stdin.read()
  if RAISES.value:
    raise {"os": OSError("漢"), "hopeless": ZeroDivisionError("漢"), "interrupt": KeyboardInterrupt()}[RAISES.value]
  text = cli.typed("words", WORDS.value)
  with open("seen", "w", encoding="utf-8") as file:
    file.write("|".join([read, text, ascii(TO.value), *argv[1:]]))
  print(f"€漢 {text}" * 1000)
  print("漢", file=sys.stderr)

cli.run(main, parse=cli.parse_arguments, outlives_output=OUTLIVES, hopeless=(ZeroDivisionError,), interrupted="bye")
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
    ("--numbers=4,x", 2, "error: flag --numbers=4,x: must be whole numbers of at least 2, separated by commas\n"),
    ("--numbers=4,1", 2, "error: flag --numbers=4,1: must be whole numbers of at least 2, separated by commas\n"),
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


# A program that takes a trained run: only fields that are given count.
OVERRIDING = """
from mc_jax import cli
CONFIG = cli.overrides_flag()
LENGTHS = cli.numbers_flag("lengths", [], "numbers")
cli.run(lambda _: print(cli.overrides(CONFIG), LENGTHS.value), CONFIG)
"""


def _overrides(door, tmp_path, *given):
  (tmp_path / "door.py").write_text(OVERRIDING)
  return door(tmp_path / "door.py", *given)


def test_fields_given_are_typed_and_the_others_left_out(door, tmp_path):
  done = _overrides(
    door,
    tmp_path,
    "--config.data.length=2048",
    "--config.model.memory.max_step=0.5",
    "--config.data.mqar.pairs=(4,8)",
    "--noconfig.model.tied_embeddings",
    "--config.model.memory.implementation=xla",
    "--lengths=16, 8",
  )
  assert done.returncode == 0, done.stderr
  assert (
    done.stdout.strip()
    == str(
      {
        "data.length": 2048,
        "model.memory.max_step": 0.5,
        "data.mqar.pairs": (4, 8),
        "model.tied_embeddings": False,
        "model.memory.implementation": "xla",
      }
    )
    + " [16, 8]"
  )


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.model.memory.agregation=ssc", "nearest field is model.memory.aggregation"),
    ("--config.model.mixer=transformer", "write model.pattern (mixer='transformer' is pattern=attention, "),
    ("--config.model.rope_theta=500", "write model.attention.rope_theta"),
    ("--config.data.length=two", "config.data.length=two: invalid literal"),
    ("--config=configs/quickstart.py", "the configuration is read from --workdir=RUN"),
    ("--steps=2", "there is no flag --steps; did you mean --config.train.steps?"),
    ("--zzzz", "there is no flag --zzzz; --help lists all flags"),
    ("data.length=2", "not a flag: data.length=2"),
  ],
)
def test_mistyped_fields_end_with_one_line(door, tmp_path, flag, message):
  done = _overrides(door, tmp_path, flag)
  assert done.returncode == 2
  assert message in done.stderr
  assert "Traceback" not in done.stderr


# A program that takes a configuration.
CONFIGURED = """
from mc_jax import cli
from mc_jax.training import config
CONFIG = cli.config_flag()
cli.run(lambda _: print(config.from_config_dict(CONFIG.value).model.pattern), CONFIG)
"""


@pytest.mark.parametrize(
  ("line", "flags", "said"),
  [
    (
      'c.model.mixer = "transformer"',
      [],
      "there is no model.mixer any more; write model.pattern (mixer='transformer' is",
    ),
    ('c.model.pattern = ["memory", "attention"]', [], "('memory', 'attention')"),
    ("", ["--config.model.pattern=memory,attention"], "('memory', 'attention')"),
    ("", ["--config.model.pattern=('memory', 'attention')"], "('memory', 'attention')"),
  ],
)
def test_a_pattern_is_written_in_a_file_or_a_flag_and_a_mixer_is_told_of(door, tmp_path, line, flags, said):
  (tmp_path / "door.py").write_text(CONFIGURED)
  lines = [
    "from mc_jax.training import config",
    "def get_config():",
    "  c = config.default()",
    f"  {line}",
    "  return c",
  ]
  (tmp_path / "config.py").write_text("\n".join(lines))
  done = door(tmp_path / "door.py", f"--config={tmp_path / 'config.py'}", *flags)
  assert said in done.stdout + done.stderr
  assert done.returncode == (2 if "mixer" in line else 0)
  assert "Traceback" not in done.stderr


def test_a_config_file_below_the_home_folder_is_found(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  given = ["train", "--config=~/a.py", "-config=~/a.py:x=1", "--config.data.paths=~/b", "--config=c~", "--config"]
  expected = ["train", "--config=/home/me/a.py", "-config=/home/me/a.py:x=1", *given[3:]]
  assert cli.expanded(given) == expected
