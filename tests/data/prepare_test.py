"""The door: how it ends, and what it prints where nobody watches a terminal."""

import functools
import json
import os
import re

import pytest

from mc_jax.data import preparation
from mc_jax.data.config import SourceConfig


@pytest.fixture
def corpus(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "one two, one two"}\n' * 50)
  return tmp_path / "a.jsonl"


def _die(_):
  os.kill(os.getpid(), 9)


def test_it_learns_tokenizes_and_says_how_many_ids_there_were_to_learn(corpus, tmp_path, door):
  prepare = functools.partial(door, "data.prepare", "--source=jsonl", f"--paths={corpus}", f"--out={tmp_path}/out")
  done = prepare("--train_bpe=32768")
  assert done.returncode == 0, done.stderr
  assert re.search(r"learned 26\d of 32,768 ids in \d+ s: the text has no more pairs\n", done.stdout)
  assert "50 documents, 800 bytes of text" in done.stdout
  again = prepare("--train_bpe=32768")
  assert again.returncode == 0
  assert "learned" not in again.stdout
  other = prepare("--train_bpe=300")
  assert other.returncode == 2
  assert "--train_bpe was 32768 and is now 300" in other.stderr
  other = prepare("--tokenizer=bytes", "--train_bytes=10")
  assert other.returncode == 2
  assert "--train_bytes is read only with --train_bpe" in other.stderr
  assert prepare(f"--tokenizer={tmp_path}/out/tokenizer.json").returncode == 0


def test_a_log_file_gets_lines_and_no_bar(corpus, tmp_path, capfd, monkeypatch):
  monkeypatch.setattr(preparation, "_EVERY", 0.0)
  source = SourceConfig(source="jsonl", paths=str(corpus))
  preparation.prepare(source, str(tmp_path / "out"), "bytes", processes=1)
  out, err = capfd.readouterr()
  assert re.search(r"^50 of 50 documents, 00:00 left$", out, re.MULTILINE)
  assert "\r" not in out + err
  assert "documents" not in err


def test_bad_input_ends_with_status_2_and_one_line(corpus, door, tmp_path):
  corpus.write_text(json.dumps({"text": "cut \ud83d"}) + "\n")
  flags = [f"--paths={corpus}", f"--out={tmp_path}/out", "--tokenizer=bytes", "--processes=1"]
  ended = door("data.prepare", "--source=jsonl", *flags)
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
def test_messages_name_its_own_flags(corpus, door, tmp_path, flags, message):
  flags = [flag.format(corpus=corpus) for flag in flags]
  ended = door("data.prepare", "--source=jsonl", *flags, f"--out={tmp_path}/out")
  assert ended.returncode == 2
  assert re.match(f"error: {message}", ended.stderr), ended.stderr


def test_a_killed_process_ends_with_status_1(corpus, tmp_path, monkeypatch):
  monkeypatch.setattr(preparation, "_start", _die)
  with pytest.raises(OSError, match="a tokenizing process was killed"):
    preparation.prepare(SourceConfig(source="jsonl", paths=str(corpus)), str(tmp_path / "out"), "bytes", processes=1)
