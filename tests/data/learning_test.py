"""A tokenizer is learned once, whole, and never taken for one that was learned from something else."""

import json

import pytest
from etils import epath

from mc_jax.data import learning, preparation, tokenizers
from mc_jax.data.config import SourceConfig
from mc_jax.errors import ConfigError


@pytest.fixture
def source(corpora):
  return SourceConfig(source="parquet", paths=str(corpora["parquet"]))


def test_a_tokenizer_is_learned_from_part_of_the_corpus(source, tmp_path):
  found = learning.train(source, 280, 500, epath.Path(tmp_path / "tokenizer.json"))
  assert 257 < tokenizers.load(str(tmp_path / "tokenizer.json")).vocab_size == found <= 280


def test_fewer_ids_than_asked_for_are_counted(source, tmp_path):
  assert 257 < learning.learn(source, 32768, 200, str(tmp_path / "out")) < 1000


def test_it_is_learned_again_only_where_it_is_missing(source, corpora, tmp_path, monkeypatch):
  out = tmp_path / "out"
  assert learning.learn(source, 280, 5000, str(out)) == 280
  data = (out / learning.FILE).read_bytes()
  monkeypatch.setattr(tokenizers, "train_bpe", None)
  monkeypatch.chdir(corpora["parquet"])
  for paths in (source.paths, "../parquet", ".."):  # the same files, from wherever the command is given
    assert learning.learn(SourceConfig(source="parquet", paths=paths), 280, 5000, str(out)) is None
  (tmp_path / "more.parquet").write_bytes(b"")
  more = SourceConfig(source="parquet", paths=f"{source.paths},{tmp_path}/more.parquet")
  with pytest.raises(ConfigError, match=r"--paths was '.*' and is now '.*more\.parquet'"):
    learning.learn(more, 280, 5000, str(out))
  assert (out / learning.FILE).read_bytes() == data


@pytest.mark.parametrize(
  ("fields", "settings", "message"),
  [
    ({}, (300, 5000), "--train_bpe was 280 and is now 300"),
    ({}, (280, 6000), "--train_bytes was 5000 and is now 6000"),
    ({}, (300, 6000), "--train_bpe was 280 and is now 300; --train_bytes was 5000"),
    ({"field": "body"}, (280, 5000), "--field was text and is now body"),
    ({"source": "jsonl"}, (280, 5000), "--source was parquet and is now jsonl; --paths was"),
  ],
)
def test_other_settings_are_refused_and_named(source, corpora, tmp_path, fields, settings, message):
  out = str(tmp_path / "out")
  learning.learn(source, 280, 5000, out)
  fields = {"source": "parquet", "paths": str(corpora[fields.get("source", "parquet")])} | fields
  with pytest.raises(ConfigError, match=rf"learned with other settings: {message}.*--tokenizer={out}/tokenizer\.json"):
    learning.learn(SourceConfig(**fields), *settings, out)


def test_files_that_came_to_a_glob_are_told(corpora, tmp_path):
  for name in ("a", "b"):
    (tmp_path / f"{name}.txt").write_text(name * 100)
    source = SourceConfig(source="text", paths=f"{tmp_path}/*.txt")
    if name == "a":
      learning.learn(source, 258, 5000, str(tmp_path / "out"))
  with pytest.raises(ConfigError, match=r"--paths='.*' now matches other files"):
    learning.learn(source, 258, 5000, str(tmp_path / "out"))


def test_a_tokenizer_of_unknown_origin_is_refused(source, texts, tmp_path, in_process):
  tokenizers.train_bpe(texts, 300, tmp_path / "other.json")
  preparation.prepare(source, str(tmp_path / "out"), str(tmp_path / "other.json"))
  with pytest.raises(ConfigError, match=r"has a tokenizer\.json without a note of what it was learned from"):
    learning.learn(source, 300, 5000, str(tmp_path / "out"))
  preparation.prepare(source, str(tmp_path / "bytes"), "bytes")
  with pytest.raises(ConfigError, match=r"holds a corpus that was tokenized with --tokenizer"):
    learning.learn(source, 300, 5000, str(tmp_path / "bytes"))
  assert not (tmp_path / "bytes" / learning.FILE).exists()
  (tmp_path / "out" / learning.NOTE).write_text(json.dumps({"train_bpe": 300}))
  with pytest.raises(ConfigError, match=r"tokenizer\.settings\.json is not a note"):
    learning.learn(source, 300, 5000, str(tmp_path / "out"))


def test_interrupted_it_leaves_no_half_tokenizer(source, tmp_path, monkeypatch):
  out = tmp_path / "out"
  original = tokenizers.train_bpe

  def dying(texts, size, path):
    original(texts, size, path)
    path.write_text(path.read_text()[:100])
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(tokenizers, "train_bpe", dying)
    learning.learn(source, 280, 5000, str(out))
  assert not (out / learning.FILE).exists()
  assert learning.learn(source, 300, 5000, str(out)) == 300  # nothing was learned yet: other settings are welcome
  assert learning.learn(source, 300, 5000, str(out)) is None


def test_a_malformed_document_stops_before_anything_is_learned(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": null}\n')
  source = SourceConfig(source="jsonl", paths=f"{tmp_path}/a.jsonl")
  with pytest.raises(ConfigError, match=r"a\.jsonl, line 2: field 'text' is null"):
    learning.learn(source, 300, 5000, str(tmp_path / "out"))
  assert not (tmp_path / "out" / learning.FILE).exists()
  assert learning.learn(source, 300, 5000, str(tmp_path / "out"), "skip") == 260
