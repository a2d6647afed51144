"""The door: how it ends, and what it prints where nobody watches a terminal."""

import json
import os
import re
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from mc_jax.data import ConfigError, preparation, prepare
from mc_jax.data.config import SourceConfig


@pytest.fixture
def corpus(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "one two, one two"}\n' * 50)
  return tmp_path / "a.jsonl"


def _prepare(*arguments):
  with flagsaver.flagsaver():
    flags.FLAGS(["prepare", *arguments])
    prepare.main([])


def _die(_):
  os.kill(os.getpid(), 9)


def _command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "mc_jax.data.prepare", *arguments],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    check=False,
  )


def test_it_learns_tokenizes_and_says_how_many_ids_there_were_to_learn(corpus, tmp_path, capfd, in_process):
  arguments = ["--source=jsonl", f"--paths={corpus}", f"--out={tmp_path}/out"]
  _prepare(*arguments, "--train_bpe=32768")
  out = capfd.readouterr().out
  assert re.search(r"learned 26\d of 32,768 ids in \d+ s: the text has no more pairs\n", out)
  assert "50 documents, 800 bytes of text" in out
  _prepare(*arguments, "--train_bpe=32768")
  assert "learned" not in capfd.readouterr().out
  with pytest.raises(ConfigError, match="--train_bpe was 32768 and is now 300"):
    _prepare(*arguments, "--train_bpe=300")
  with pytest.raises(ConfigError, match="--train_bytes is read only with --train_bpe"):
    _prepare(*arguments, "--tokenizer=bytes", "--train_bytes=10")
  _prepare(*arguments, f"--tokenizer={tmp_path}/out/tokenizer.json")


def test_a_log_file_gets_lines_and_no_bar(corpus, tmp_path, capfd, monkeypatch):
  monkeypatch.setattr(preparation, "_EVERY", 0.0)
  source = SourceConfig(source="jsonl", paths=str(corpus))
  preparation.prepare(source, str(tmp_path / "out"), "bytes", processes=1)
  out, err = capfd.readouterr()
  assert re.search(r"^50 of 50 documents, 00:00 left$", out, re.MULTILINE)
  assert "\r" not in out + err
  assert "documents" not in err


def test_bad_input_ends_with_status_2_and_one_line(corpus, tmp_path):
  corpus.write_text(json.dumps({"text": "cut \ud83d"}) + "\n")
  ended = _command("--source=jsonl", f"--paths={corpus}", f"--out={tmp_path}/out", "--tokenizer=bytes", "--processes=1")
  assert ended.returncode == 2
  assert re.fullmatch(r".*a\.jsonl, line 1: field 'text' holds \\ud83d, half a .* --on_error=skip .*\n", ended.stderr)
  assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--paths=", "--tokenizer=bytes"), "--paths must be files, .* when --source is jsonl, got ''"),
    (("--paths=none/*.x", "--tokenizer=bytes"), r"--paths: no file matches 'none/\*\.x'; relative paths are read "),
    (("--paths={corpus}", "--tokenizer=a/data.tokenizer.json"), r"--tokenizer must be .*'a/data\.tokenizer\.json'"),
  ],
)
def test_messages_name_its_own_flags(corpus, tmp_path, flags, message):
  flags = [flag.format(corpus=corpus) for flag in flags]
  ended = _command("--source=jsonl", *flags, f"--out={tmp_path}/out")
  assert ended.returncode == 2
  assert re.match(f"error: {message}", ended.stderr), ended.stderr


def test_a_killed_process_ends_with_status_1(corpus, tmp_path, monkeypatch):
  monkeypatch.setattr(preparation, "_start", _die)
  with pytest.raises(OSError, match="a process that tokenized was killed"):
    preparation.prepare(SourceConfig(source="jsonl", paths=str(corpus)), str(tmp_path / "out"), "bytes", processes=1)
