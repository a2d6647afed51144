"""What a source can hold and a tokenizer cannot take is a malformed document: named, or skipped and counted."""

import dataclasses
import json

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers as huggingface
import written

from mc_jax.data import DataConfig, PackingConfig, datasets, preparation, tokenizers
from mc_jax.data.config import SourceConfig
from mc_jax.data.documents import Documents
from mc_jax.data.formats import blocks
from mc_jax.errors import ConfigError

GOOD = '{"text": "good"}'
DEEP = "[" * 100_000 + "]" * 100_000
LINES = {
  "a lone surrogate": (r'{"text": "cut \ud83d"}', r"field 'text' holds \\ud83d, half a character, at position 4"),
  "the other half": (r'{"text": "\ude00"}', r"field 'text' holds \\ude00, half a character, at position 0"),
  "a deep field": (f'{{"text": {DEEP}}}', "not JSON .*maximum recursion depth"),
  "a deep neighbour": (f'{{"text": "good", "tree": {DEEP}}}', "not JSON .*maximum recursion depth"),
  "a huge number": (f'{{"text": "good", "n": {"9" * 5000}}}', "not JSON .*4300 digits"),
  "null": ('{"text": null}', "field 'text' is null, not a string"),
  "a list": ('{"text": ["a"]}', "field 'text' is a list, not a string"),
  "NaN": ('{"text": NaN}', "field 'text' is a number, not a string"),
  "no field": ('{"body": "a", "n": 1}', r"no field 'text' \(field of the source\); the line has body, n"),
  "a field that is no text": (r'{"\ud83d": 1}', r"the line has \\ud83d"),
  "a number": ("3", "the line has a number"),
  "a NUL": (r'{"text": "a\u0000b"}', "holds a NUL character"),
  "an array": ('["a"]', r"a JSON array; jq -c '\.\[\]' turns a file that is one array into lines"),
  "a torn line": ('{"text": "go', "not JSON .*Unterminated string starting at: column 10"),
}


def _write(tmp_path, lines):
  path = tmp_path / "a.jsonl"
  path.write_text("".join(f"{line}\n" for line in lines))
  return SourceConfig(source="jsonl", paths=str(path))


def _words(tmp_path):
  """A tokenizer of three words that cannot take others."""
  made = huggingface.Tokenizer(huggingface.models.WordLevel({"good": 0, "too": 1, "</s>": 2}, unk_token="[UNK]"))
  made.pre_tokenizer = huggingface.pre_tokenizers.Whitespace()
  made.save(str(tmp_path / "words.json"))
  return str(tmp_path / "words.json")


def _check(source, folder, message, texts, tokenizer="bytes", skipped=1):
  """Training and prepare name what is malformed, or leave it out and count it."""
  loaded = tokenizers.load(tokenizer)
  with pytest.raises(ConfigError, match=rf"(?s){message}.*on_error=skip"):
    documents = Documents(blocks(source), loaded)
    [documents[i] for i in range(len(documents))]
  documents = Documents(blocks(source), loaded, "skip")
  ids = [documents[i] for i in range(len(documents))]
  assert [loaded.decode(found[1:-1]) for found in ids if len(found)] == texts
  assert len(documents.skipped) == skipped

  folder.mkdir()
  job = preparation.Job(blocks(source), str(folder), tokenizer, "", "<u2", "stop")
  with pytest.raises(ConfigError, match=rf"(?s){message}.*on_error=skip"):
    preparation.write("x.array_record", job)
  assert not list(folder.iterdir())
  shard = preparation.write("x.array_record", dataclasses.replace(job, on_error="skip"))
  assert (shard.documents, shard.skipped) == (len(texts), skipped)


@pytest.mark.parametrize("what", LINES)
def test_a_line_that_is_no_text(tmp_path, what):
  line, message = LINES[what]
  source = _write(tmp_path, [GOOD, "", line, '{"text": "too"}'])
  _check(source, tmp_path / "out", rf"a\.jsonl, line 3: .*{message}", ["good", "too"])


def test_a_text_that_the_tokenizer_cannot_take(tmp_path):
  source = _write(tmp_path, [GOOD, '{"text": "bad"}', '{"text": "too"}'])
  message = r"a\.jsonl, line 2: the tokenizer cannot take this text: .*Missing \[UNK\]"
  _check(source, tmp_path / "out", message, ["good", "too"], _words(tmp_path))


@pytest.mark.parametrize("texts", [["good", None, "too"], ["good", "a\0b", "too"]])
def test_a_row_that_is_no_text(tmp_path, texts):
  written.parquet(tmp_path / "a.parquet", texts)
  source = SourceConfig(source="parquet", paths=str(tmp_path / "a.parquet"))
  _check(source, tmp_path / "out", r"a\.parquet, row 1: field 'text' (is null|holds a NUL)", ["good", "too"])


def test_a_row_that_is_not_utf8(tmp_path):
  data = pyarrow.array([b"good", b"\xed\xa0\xbd", b"too"])
  for kind in ("string", "binary"):
    column = data if kind == "binary" else pyarrow.Array.from_buffers(pyarrow.string(), 3, data.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{kind}.parquet")
    source = SourceConfig(source="parquet", paths=str(tmp_path / f"{kind}.parquet"))
    _check(source, tmp_path / kind, rf"{kind}\.parquet, row 1: not UTF-8", ["good", "too"])


@pytest.mark.parametrize("record", [b"a\0b", b"\xed\xa0\xbd", b"caf\xe9"])
def test_a_record_that_is_no_text(tmp_path, record):
  written.array_record(tmp_path / "a.array_record", [b"good", record, b"too"])
  source = SourceConfig(source="arrayrecord", paths=str(tmp_path / "a.array_record"))
  _check(source, tmp_path / "out", r"a\.array_record, record 1 is not text", ["good", "too"])


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "dictionary"])
def test_columns_of_text_of_all_types_are_read(tmp_path, kind):
  texts = ["naïve", "", "漢字"]
  column = pyarrow.array(texts)
  column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
  nested = pyarrow.array([{"text": "no", "b": 1}] * 3)
  table = pyarrow.table({"nested": nested, "text": column})
  with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
    writer.write_table(table.slice(0, 2))
    writer.write_table(table.slice(0, 0))
    writer.write_table(table.slice(2))
  found = blocks(SourceConfig(source="parquet", paths=str(tmp_path / "a.parquet")))
  documents = Documents(found, tokenizers.Bytes())
  assert [documents.text(i) for i in range(3)] == texts
  assert [block.count for block in found] == [2, 1]


@pytest.mark.parametrize(
  ("columns", "field", "message"),
  [
    (["text", "id", "text"], "text", r"has 2 columns 'text' \(field of the source\)"),
    (["id"], "text", "no column 'text'.*it has id"),
    (["id"], "id", r"column 'id' \(field of the source\) holds int64, not strings"),
    (["list"], "list", "holds list<.*>, not strings"),
    (["struct"], "struct", "holds struct<.*>, not strings"),
    (["struct"], "struct.a", r"no column 'struct\.a'"),
  ],
)
def test_columns_that_cannot_be_read_are_named(tmp_path, columns, field, message):
  values = {"text": ["a"], "id": [1], "list": [["a"]], "struct": [{"a": "b"}]}
  table = pyarrow.Table.from_arrays([pyarrow.array(values[name]) for name in columns], columns)
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  with pytest.raises(ConfigError, match=rf"a\.parquet.*{message}"):
    blocks(SourceConfig(source="parquet", paths=str(tmp_path), field=field))


@pytest.mark.parametrize("size", [0, 3, 100])
def test_a_torn_parquet_file_is_named(tmp_path, size):
  written.parquet(tmp_path / "a.parquet", ["one"] * 50)
  data = (tmp_path / "a.parquet").read_bytes()
  (tmp_path / "a.parquet").write_bytes(data[:size])
  with pytest.raises(ConfigError, match=r"cannot read .*a\.parquet"):
    blocks(SourceConfig(source="parquet", paths=str(tmp_path)))


def test_lines_as_other_systems_end_and_mark_them(tmp_path):
  lines = ['{"text": "one\\u2028two"}', '{"text": "three\u2028four"}', '{"text": "x", "text": "last"}', ""]
  (tmp_path / "a.jsonl").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
  documents = Documents(blocks(SourceConfig(source="jsonl", paths=str(tmp_path))), tokenizers.Bytes())
  assert [documents.text(i) for i in range(3)] == ["one\u2028two", "three\u2028four", "last"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_lines_in_utf16_are_named(tmp_path, encoding):
  (tmp_path / "a.jsonl").write_bytes((GOOD + "\n" + GOOD + "\n").encode(encoding))
  documents = Documents(blocks(SourceConfig(source="jsonl", paths=str(tmp_path))), tokenizers.Bytes())
  with pytest.raises(ConfigError, match=r"a\.jsonl, line 1 is (UTF-16, not UTF-8: convert it|not text)"):
    documents[0]


def test_a_file_that_is_one_array_is_named(tmp_path):
  (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
  documents = Documents(blocks(SourceConfig(source="jsonl", paths=str(tmp_path))), tokenizers.Bytes())
  with pytest.raises(ConfigError, match=r"a\.json, line 1: a JSON array; jq -c '\.\[\]' turns"):
    documents[0]


def test_files_that_change_under_a_run_are_named(tmp_path):
  source = _write(tmp_path, [GOOD] * 9)
  lines = Documents(blocks(source), tokenizers.Bytes())
  (tmp_path / "a.jsonl").write_text(GOOD + "\n")
  with pytest.raises(ConfigError, match=r"a\.jsonl has changed since the run started: it had 9 documents"):
    lines[5]
  written.parquet(tmp_path / "a.parquet", ["one"] * 9, rows=9)
  rows = Documents(blocks(SourceConfig(source="parquet", paths=f"{tmp_path}/a.parquet")), tokenizers.Bytes())
  written.parquet(tmp_path / "a.parquet", ["one"])
  with pytest.raises(ConfigError, match=r"a\.parquet has changed since the run started: it had 9 documents"):
    rows[5]


def test_a_damaged_record_is_named(tmp_path):
  path = tmp_path / "a.array_record"
  written.array_record(path, [b"%d" % i * 500 for i in range(50)])
  data = bytearray(path.read_bytes())
  data[300:400] = bytes(100)
  path.write_bytes(data)
  documents = Documents(blocks(SourceConfig(source="arrayrecord", paths=str(path))), tokenizers.Bytes())
  with pytest.raises(ConfigError, match=r"cannot read .*a\.array_record, record \d+: .*Corrupted"):
    [documents[i] for i in range(50)]


def test_a_tokenizer_that_cannot_take_the_prose_of_a_task_is_named(tmp_path):
  with pytest.raises(ConfigError, match=r"data\.tokenizer cannot take the text of niah: .*Missing \[UNK\]"):
    datasets.load(
      DataConfig(source="niah", tokenizer=_words(tmp_path), length=512, packing=PackingConfig("concat"), batch_size=1)
    )


class Rust(BaseException):
  """What a panic looks like."""


def test_a_panic_of_a_package_is_an_error_of_the_text_and_an_interrupt_is_not(tmp_path, monkeypatch):
  tokenizer = tokenizers.load(_words(tmp_path))
  Rust.__name__ = "PanicException"
  for error, seen in ((Rust("boom"), ValueError), (KeyboardInterrupt(), KeyboardInterrupt)):

    class Dying:
      def encode_batch_fast(self, *_, error=error, **__):
        raise error

    monkeypatch.setattr(tokenizer, "_tokenizer", Dying())
    with pytest.raises(seen):
      tokenizer.encode(["good"])
