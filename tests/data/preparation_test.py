"""A corpus is tokenized once, whole, whatever stops it on the way."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from mc_jax.data import ConfigError, DataConfig, PackingConfig, datasets, manifests, preparation, tokenizers
from mc_jax.data.config import SourceConfig
from mc_jax.data.documents import Documents
from mc_jax.data.formats import blocks


@pytest.fixture(autouse=True)
def here(monkeypatch):
  """Shards are written in this process, one after the other."""

  def run(jobs, done, blocks, processes):
    return {name: preparation.write(name, job) for name, job in jobs.items()}

  monkeypatch.setattr(preparation, "_run", run)


@pytest.fixture
def source(corpora):
  return SourceConfig(source="parquet", paths=str(corpora["parquet"]))


@pytest.fixture
def bpe(texts, tmp_path):
  tokenizers.train_bpe(texts, 300, tmp_path / "bpe.json")
  return str(tmp_path / "bpe.json")


def _ids(folder, tokenizer):
  loaded = tokenizers.load(tokenizer)
  documents = Documents(blocks(SourceConfig(source="tokens", paths=str(folder)), loaded.fingerprint), loaded)
  return [documents[i] for i in range(len(documents))]


@pytest.mark.parametrize("shards", [1, 4, 100])
def test_the_ids_are_those_of_the_documents_in_their_order(source, texts, bpe, tmp_path, shards):
  manifest = preparation.prepare(source, str(tmp_path / "out"), bpe, shards=shards)
  loaded = tokenizers.load(bpe)
  ids = _ids(tmp_path / "out", bpe)
  assert [loaded.decode(document[1:-1]) for document in ids] == texts
  assert len(manifest.shards) == min(shards, 9)  # row groups
  assert sum(shard.documents for shard in manifest.shards) == len(texts)
  assert sum(shard.tokens for shard in manifest.shards) == sum(len(document) - 2 for document in ids)
  assert sum(shard.text_bytes for shard in manifest.shards) == len("".join(texts).encode())
  assert manifest.sources == ("a.parquet", "b.parquet")
  assert (tmp_path / "out" / manifest.tokenizer_file).read_bytes() == (tmp_path / "bpe.json").read_bytes()
  assert manifests.read(str(tmp_path / "out")) == manifest


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_killed_anywhere_it_goes_on_without_loss_or_repetition(source, texts, tmp_path, monkeypatch, at):
  """Killed in the middle of shard 2: before its file, before it is in place, before it is noted; or before the end."""
  out, calls = tmp_path / "out", []
  place = [(preparation.tokenizers.Bytes, "encode"), (preparation.os, "replace"), (preparation.whole, "write")]
  killed = {0: 3, 1: 2, 2: 1 + 3, 3: 99}[at]
  if at < 3:
    owner, name = place[at]
    original = getattr(owner, name)

    def dying(*args):
      calls.append(args)
      if len(calls) == killed:
        raise KeyboardInterrupt
      return original(*args)

    with monkeypatch.context() as patch:
      patch.setattr(owner, name, dying)
      with pytest.raises(KeyboardInterrupt):
        preparation.prepare(source, str(out), "bytes", shards=5)
    assert not (out / manifests.FILE).exists()
    with pytest.raises(ConfigError, match="has no manifest"):
      blocks(SourceConfig(source="tokens", paths=str(out)))
  kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.array_record")} if out.exists() else {}
  preparation.prepare(source, str(out), "bytes", shards=5)
  assert [tokenizers.decode(ids[1:-1]) for ids in _ids(out, "bytes")] == texts
  noted = {name for name in kept if name in ("tokens-00000-of-00005.array_record",)}
  assert all((out / name).stat().st_mtime_ns == kept[name] for name in noted)
  assert len(list(out.glob("*.array_record"))) == 5
  assert not list(out.glob(".partial-*"))


def test_another_corpus_or_tokenizer_is_refused(source, corpora, bpe, tmp_path):
  out = str(tmp_path / "out")
  preparation.prepare(source, out, "bytes")
  for other, tokenizer in ((source, bpe), (SourceConfig(source="jsonl", paths=str(corpora["jsonl"])), "bytes")):
    with pytest.raises(ConfigError, match="holds another tokenized corpus"):
      preparation.prepare(other, out, tokenizer)
  config = DataConfig(source="tokens", paths=out, tokenizer=bpe, packing=PackingConfig("concat"))
  with pytest.raises(ConfigError, match="tokenized with another tokenizer"):
    datasets.load(config)


def test_malformed_documents_stop_or_are_counted(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbad\n{"text": "too"}\n')
  source = SourceConfig(source="jsonl", paths=str(tmp_path / "a.jsonl"))
  with pytest.raises(ConfigError, match=r"a\.jsonl, line 2: not JSON.*--on_error=skip"):
    preparation.prepare(source, str(tmp_path / "out"), "bytes")
  (shard,) = preparation.prepare(source, str(tmp_path / "out"), "bytes", on_error="skip").shards
  assert (shard.documents, shard.skipped) == (2, 1)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", ".."])
def test_a_manifest_that_leaves_its_folder_is_refused(source, tmp_path, name):
  out = tmp_path / "out"
  preparation.prepare(source, str(out), "bytes", shards=1)
  tree = json.loads((out / manifests.FILE).read_text())
  tree["shards"][0]["file"] = name
  (out / manifests.FILE).write_text(json.dumps(tree))
  with pytest.raises(ConfigError, match="not a plain name of a file"):
    manifests.read(str(out))


def test_torn_files_and_ids_out_of_range_are_named(source, tmp_path):
  out = tmp_path / "out"
  manifest = preparation.prepare(source, str(out), "bytes", shards=1)
  small = dataclasses.replace(manifest, vocab_size=100)
  manifests.write(epath.Path(out), small)
  with pytest.raises(ConfigError, match=r"record \d+: id \d+ is not below the tokenizer's 100"):
    _ids(out, "bytes")
  shard = dataclasses.replace(manifest.shards[0], documents=61)
  manifests.write(epath.Path(out), dataclasses.replace(manifest, shards=(shard,)))
  with pytest.raises(ConfigError, match=r"has 60 records, its manifest says 61"):
    _ids(out, "bytes")


def test_shards_are_of_about_the_same_size(source):
  parts = preparation.divide(blocks(source), 3)
  sizes = np.array([sum(block.size for block in part) for part in parts])
  assert [block for part in parts for block in part] == blocks(source)
  assert sizes.max() < 2.5 * sizes.min()


def test_a_tokenizer_is_learned_from_part_of_the_corpus(source, tmp_path):
  preparation.train(source, 280, 500, epath.Path(tmp_path / "tokenizer.json"))
  tokenizer = tokenizers.load(str(tmp_path / "tokenizer.json"))
  assert 257 < tokenizer.vocab_size <= 280
