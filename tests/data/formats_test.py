"""Every format yields the documents that were written, and names what is broken in it."""

import json

import fsspec
import pytest
import written

from mc_jax.data import DataConfig, tokenizers
from mc_jax.data.documents import Documents
from mc_jax.data.formats import blocks
from mc_jax.errors import ConfigError


def _documents(source, paths, on_error="stop", **fields):
  return Documents(blocks(DataConfig(source=source, paths=str(paths), **fields)), tokenizers.Bytes(), on_error)


def _texts(documents):
  return [documents.text(i) for i in range(len(documents))]


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "arrayrecord"])
def test_documents_are_those_written_in_their_order(corpora, texts, source):
  documents = _documents(source, corpora[source])
  assert _texts(documents) == texts
  assert documents[7].tolist() == [0, *texts[7].encode(), 0]
  assert len({documents.name(i) for i in range(len(documents))}) == len(texts)


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_files_are_read_through_fsspec(corpora, texts, source):
  memory = fsspec.filesystem("memory")
  memory.put(f"{corpora[source]}/", f"/{source}/", recursive=True)
  assert _texts(_documents(source, f"memory://{source}/**")) == texts


def test_array_records_elsewhere_are_copied_once(corpora, texts, tmp_path, monkeypatch):
  monkeypatch.setenv("MC_JAX_CACHE", str(tmp_path))
  fsspec.filesystem("memory").put(f"{corpora['arrayrecord']}/", "/arrayrecord/", recursive=True)
  assert _texts(_documents("arrayrecord", "memory://arrayrecord")) == texts
  assert len([path for path in tmp_path.iterdir() if path.stat().st_size > 1000]) == 2


def test_large_json_lines_are_several_blocks(tmp_path, texts, monkeypatch):
  monkeypatch.setattr("mc_jax.data.formats._JSONL_BLOCK", 256)  # some lines are longer
  (tmp_path / "a.jsonl").write_bytes(written.lines(texts).replace(b"\n", b"\n\n", 3))
  documents = _documents("jsonl", tmp_path)
  assert len(documents.blocks) > 10
  assert [text for text in _texts(documents) if text] == texts
  assert [documents.text(i) for i in (1, 3, 5)] == ["", "", ""]


def test_the_field_can_be_named(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(written.lines(["one", "two"], field="body"))
  written.parquet(tmp_path / "a.parquet", ["one", "two"], field="body")
  for source in ("jsonl", "parquet"):
    assert _texts(_documents(source, tmp_path, field="body")) == ["one", "two"]


BROKEN = {
  "jsonl": b'{"text": "a"}\n{"text": \n',
  "jsonl.gz": b"\x1f\x8b\x08 not gzip",
  "parquet": b"PAR1 not parquet",
  "array_record": b"x" * 70_000,
}


@pytest.mark.parametrize("suffix", BROKEN)
def test_a_broken_file_is_named(tmp_path, suffix):
  (tmp_path / f"bad.{suffix}").write_bytes(BROKEN[suffix])
  source = {"jsonl.gz": "jsonl", "array_record": "arrayrecord"}.get(suffix, suffix)
  with pytest.raises(ConfigError, match=rf"bad\.{suffix}"):
    _texts(_documents(source, tmp_path))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_torn_compressed_file_is_named(tmp_path, corpora, suffix):
  (whole,) = corpora["jsonl"].glob(f"*.{suffix}")
  (tmp_path / f"torn.jsonl.{suffix}").write_bytes(whole.read_bytes()[:-20])
  with pytest.raises(ConfigError, match=rf"torn\.jsonl\.{suffix}"):
    _documents("jsonl", tmp_path)


def test_a_torn_parquet_row_group_is_named(tmp_path, texts):
  path = tmp_path / "torn.parquet"
  written.parquet(path, texts)
  data = bytearray(path.read_bytes())
  data[20:400] = bytes(380)
  path.write_bytes(data)
  documents = _documents("parquet", path)  # its end says where everything lies, and is whole
  with pytest.raises(ConfigError, match=r"torn\.parquet"):
    _texts(documents)


def test_a_malformed_line_is_named_or_skipped_and_counted(tmp_path, caplog):
  good = json.dumps({"text": "good"})
  (tmp_path / "a.jsonl").write_text(f'{good}\n{{"text": 3}}\nnot json\n{good}\n')
  with pytest.raises(ConfigError, match=r"a\.jsonl, line 2: field 'text' is a number, not a string.*on_error=skip"):
    _texts(_documents("jsonl", tmp_path))
  documents = _documents("jsonl", tmp_path, "skip")
  assert _texts(documents) == ["good", None, None, "good"]
  assert [len(documents[i]) for i in range(4)] == [6, 0, 0, 6]
  assert documents.skipped == {1, 2}
  assert "a.jsonl, line 3: not JSON" in caplog.text


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"source": "parquet", "field": "body"}, "no column 'body' .* it has id, text"),
    ({"source": "parquet", "paths": "nowhere/*.parquet"}, "no file matches 'nowhere"),
    ({"source": "tokens"}, "has no manifest.json"),
  ],
)
def test_what_is_not_there_is_named(corpora, fields, message):
  with pytest.raises(ConfigError, match=message):
    _documents(**{"paths": corpora["parquet"]} | fields)
