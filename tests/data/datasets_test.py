"""What a run reads is split, mixed and checked as configured."""

import numpy as np
import pytest

from mc_jax.data import DataConfig, PackingConfig, PartConfig, datasets, tokenizers
from mc_jax.data.recall import CopyingConfig
from mc_jax.errors import ConfigError

PACKED = PackingConfig(method="concat")


def _config(source, paths="", **fields):
  return DataConfig(source=source, paths=str(paths), **{"length": 64, "batch_size": 2, "packing": PACKED} | fields)


def _documents(rows):
  """The texts in rows, where nothing is cut."""
  found = set()
  for row in rows:
    for number in range(1, row["segment_ids"].max() + 1):
      found.add(tokenizers.decode(row["targets"][row["segment_ids"] == number]).rstrip("\n"))
  return found


def _validation(data, name):
  return [{k: v[i] for k, v in batch.items()} for batch in data.validation[name].batches for i in range(2)]


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "arrayrecord"])
def test_documents_are_for_training_or_for_validation(corpora, texts, source):
  data = datasets.load(_config(source, corpora[source], length=16384, validation_fraction=0.3, validation_tokens=0))
  held_out = _documents(_validation(data, source))
  mixture = data.training(0)
  seen = _documents(mixture.row(i) for i in range(8))  # cut ends do not matter: they are in no text
  assert 5 < len(held_out) < 35
  assert held_out < set(texts)
  assert seen & set(texts) == set(texts) - held_out
  scored = sum(len(text.encode()) + 1 for text in held_out)
  assert data.validation[source].count == scored
  assert data.unit == "byte"


def test_a_source_can_be_for_one_split(corpora, texts):
  parts = {
    "train": PartConfig(source="jsonl", paths=f"{corpora['jsonl']}/a*", split="training"),
    "held": PartConfig(source="jsonl", paths=f"{corpora['jsonl']}/b*", split="validation"),
  }
  data = datasets.load(_config("mixture", sources=parts, length=16384, validation_tokens=0))
  assert list(data.validation) == ["held"]
  assert _documents(_validation(data, "held")) == set(texts[25:])
  assert _documents(data.training(0).row(i) for i in range(4)) & set(texts) == set(texts[:25])


def test_long_documents_are_seen_so_many_times_as_often(corpora, texts):
  long = {text for text in texts if len(text.encode()) >= 400}
  assert 3 <= len(long) <= 6
  packing = PackingConfig(method="best_fit", window=8)
  config = _config("jsonl", corpora["jsonl"], length=4096, batch_size=1, packing=packing, validation_fraction=1e-9)
  counts = {}
  for weight in (1.0, 4.0):
    part = PartConfig(**{**vars(config.parts["jsonl"]), "long_tokens": 400, "long_weight": weight, "split": "training"})
    held = PartConfig(source="jsonl", paths=str(corpora["jsonl"]), split="validation")
    data = datasets.load(
      DataConfig(**{**vars(config), "source": "mixture", "paths": "", "sources": {"a": part, "held": held}})
    )
    mixture, counts[weight] = data.training(0), np.zeros(2)
    for i in range(200):
      row = mixture.row(i)
      starts = np.flatnonzero(np.diff(row["segment_ids"], prepend=0) * (row["segment_ids"] > 0))
      sizes = np.bincount(row["segment_ids"])[1:]
      assert len(sizes) == len(starts)
      counts[weight] += np.bincount((sizes > 400).astype(int), minlength=2)
  ratio = (counts[4.0][1] / counts[4.0][0]) / (counts[1.0][1] / counts[1.0][0])
  assert ratio == pytest.approx(4, rel=0.15)


def test_a_task_is_a_source_whose_loss_is_on_its_answers():
  data = datasets.load(_config("copying", copying=CopyingConfig(shortest=3, longest=5)))
  assert data.unit == "answer"
  row = data.training(1).row(0)
  assert 0 < row["weights"].sum() < 40
  assert set(row) == {"tokens", "targets", "weights", "segment_ids"}
  assert (row["tokens"] != data.training(0).row(0)["tokens"]).any()
  np.testing.assert_array_equal(row["tokens"], data.training(1).row(0)["tokens"])
  assert data.vocab_size == 30


def test_bytes_of_text_are_counted_with_any_tokenizer(corpora, texts, tmp_path):
  tokenizers.train_bpe(texts, 300, tmp_path / "tokenizer.json")
  made = {}
  for name in ("bytes", str(tmp_path / "tokenizer.json")):
    fields = {"length": 4096, "validation_fraction": 0.3, "validation_tokens": 0, "tokenizer": name}
    made[name] = datasets.load(_config("parquet", corpora["parquet"], **fields)).validation["parquet"]
  plain, bpe = made.values()
  assert bpe.count == plain.count
  assert sum(b["weights"].sum() for b in bpe.batches) < 0.7 * plain.count


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"source": "web"}, "data.source must be one of stdlib, text, jsonl"),
    ({"source": "jsonl", "paths": "x", "packing": PackingConfig()}, "packing.method must be concat or best_fit for"),
    ({"source": "mixture"}, "data.sources must be one or more"),
    ({"source": "mixture", "sources": {"a": PartConfig(source="web")}}, "data.sources.a.source must be one of"),
    ({"source": "mixture", "sources": {"a": PartConfig(weight=-1.0)}}, "data.sources.a.weight must be at least 0"),
    ({"source": "mixture", "sources": {"a": PartConfig(split="x")}}, "data.sources.a.split must be one of both"),
    ({"sources": {"a": PartConfig()}}, "data.sources is read only when data.source is mixture"),
    ({"packing": PackingConfig("concat", align=3)}, "data.length must be a multiple of data.packing.align=3"),
    ({"packing": PackingConfig("fifo")}, "data.packing.method must be one of windows, concat, best_fit"),
    ({"packing": PackingConfig("best_fit", window=0)}, "data.packing.window must be at least 1"),
    ({"tokenizer": "a.json", "packing": PackingConfig()}, "must be concat or best_fit with data.tokenizer=a.json"),
    ({"workers": -1}, "data.workers must be at least 0"),
    ({"on_error": "warn"}, "data.on_error must be one of stop, skip"),
    ({"long_weight": 0.5}, "data.long_weight must be at least 1"),
    ({"source": "copying", "copying": CopyingConfig(longest=40)}, "strings of data.copying.longest=40"),
  ],
)
def test_bad_fields_are_named_with_what_would_do(fields, message):
  (problem,) = _config(**{"source": "stdlib"} | fields).problems()
  assert message in problem


def test_a_split_that_would_be_empty_is_an_error(corpora):
  with pytest.raises(ConfigError, match=r"validation split of jsonl would be empty: of 60 document\(s\)"):
    datasets.load(_config("jsonl", corpora["jsonl"], validation_fraction=1e-9))
  data = datasets.load(_config("jsonl", corpora["jsonl"], validation_fraction=1 - 1e-9))
  with pytest.raises(ConfigError, match="no document to train on among 60"):
    data.training(0).row(0)
