"""A corpus is tokenized once, whole, whatever stops it on the way."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from mc_jax.data import DataConfig, PackingConfig, datasets, learning, manifests, preparation, tokenizers
from mc_jax.data.config import SourceConfig
from mc_jax.data.documents import Documents
from mc_jax.data.formats import blocks
from mc_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("in_process")


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
  place = [(preparation.tokenizers.Bytes, "encode"), (preparation.os, "replace"), (preparation.storage, "write")]
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
  with pytest.raises(ConfigError, match=r"a\.jsonl, line 2: not JSON.*on_error=skip"):
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


def test_a_shard_without_a_document_is_passed(tmp_path):
  for i, text in enumerate(['"one"', "null ", '"two"']):
    (tmp_path / f"{i}.jsonl").write_text(f'{{"text": {text}}}')
  source, out = SourceConfig(source="jsonl", paths=f"{tmp_path}/*.jsonl"), str(tmp_path / "out")
  manifest = preparation.prepare(source, out, "bytes", shards=3, on_error="skip")
  assert sorted(shard.documents for shard in manifest.shards)[0] == 0
  assert [tokenizers.decode(ids[1:-1]) for ids in _ids(out, "bytes")] == ["one", "two"]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_corpus_without_text_is_refused(tmp_path, on_error):
  lines = {"stop": ['{"text": ""}', ""], "skip": ['{"text": null}', '{"text": ""}']}[on_error]
  (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
  source, out = SourceConfig(source="jsonl", paths=str(tmp_path / "a.jsonl")), tmp_path / "out"
  skipped = int(on_error == "skip")
  for _ in range(2):  # not a success when it is tried again, either
    with pytest.raises(ConfigError, match=rf"holds no text: {skipped} of 2 documents are malformed and were skipped"):
      preparation.prepare(source, str(out), "bytes", on_error=on_error)
    assert not (out / manifests.FILE).exists()
  with pytest.raises(ConfigError, match="hold no text to learn from"):
    learning.learn(source, 300, 1000, str(out / "bpe"), on_error)
  assert not (out / "bpe" / learning.FILE).exists()


def test_what_differs_from_what_was_begun_is_named(tmp_path, texts):
  for name in ("a", "b"):
    (tmp_path / f"{name}.jsonl").write_text('{"text": "one", "body": "two"}\n' * 3)
  paths, out = f"{tmp_path}/?.jsonl", str(tmp_path / "out")
  for size in (300, 301):
    tokenizers.train_bpe([*texts, "</s>"], size, tmp_path / f"{size}.json")
  vocab = json.loads((tmp_path / "300.json").read_text())
  vocab["added_tokens"].append({**vocab["added_tokens"][0], "id": 300, "content": "[END]"})
  (tmp_path / "300.json").write_text(json.dumps(vocab))
  bpe = str(tmp_path / "300.json")
  source = SourceConfig(source="jsonl", paths=paths)
  preparation.prepare(source, out, bpe, shards=2)
  preparation.prepare(source, out, bpe, shards=2)
  tree = {"tokenizer": str(tmp_path / "301.json")}
  for change, fields, message in (
    ({}, {"tokenizer": "bytes"}, r"--tokenizer was a file of SHA-256 \w{12} and is now bytes\."),
    ({}, tree, r"--tokenizer was a file of SHA-256 \w{12} and is now a file of SHA-256 \w{12}\."),
    ({}, {"separator": "[END]"}, r"--separator was id 0 and is now id 300\."),
    ({"field": "body"}, {}, r"--field was text and is now body\."),
    ({}, {"shards": 1}, r"--shards was 2 and is now 1\."),
    (
      {"paths": f"{tmp_path}/b.jsonl"},
      {"shards": 1},
      r"6 documents in 2 files and are now 3 documents in 1 .*b\.j",
    ),
  ):
    other = dataclasses.replace(source, **change)
    with pytest.raises(ConfigError, match=rf"holds another tokenized corpus, finished or not: .*{message}"):
      preparation.prepare(other, out, **{"tokenizer": bpe, "shards": 2} | fields)
