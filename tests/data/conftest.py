"""Small corpora in real files."""

import gzip
import pathlib
import random
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for `import written`
import written

from mc_jax.data import preparation

WORDS = ("memory", "segment", "chunk", "gate", "naïve", "café", "\u6f22\u5b57")


@pytest.fixture(scope="session")
def texts():
  """60 documents, a few of them long."""
  rng = random.Random(0)
  sizes = [rng.randrange(1, 20) for _ in range(56)] + [150, 200, 250, 300]
  rng.shuffle(sizes)
  return [f"{i}: " + " ".join(rng.choice(WORDS) for _ in range(size)) for i, size in enumerate(sizes)]


@pytest.fixture(scope="session")
def corpora(tmp_path_factory, texts):
  """{source: folder}: each holds the texts, in their order, in two files."""
  root = tmp_path_factory.mktemp("corpora")
  halves = (texts[:25], texts[25:])
  for name in ("text", "jsonl", "parquet", "arrayrecord"):
    (root / name).mkdir()
  for i, text in enumerate(texts):
    (root / "text" / f"{i:03d}.txt").write_text(text)
  (root / "jsonl" / "a.jsonl.gz").write_bytes(gzip.compress(written.lines(halves[0])))
  # Two zstd frames, one after the other, and no end of line at the end.
  data = written.lines(halves[1])
  (root / "jsonl" / "b.jsonl.zst").write_bytes(written.zstd(data[:500]) + written.zstd(data[500:-1]))
  for name, half in zip("ab", halves, strict=True):
    written.parquet(root / "parquet" / f"{name}.parquet", half)
    written.array_record(root / "arrayrecord" / f"{name}.array_record", [text.encode() for text in half])
  return {name: root / name for name in ("text", "jsonl", "parquet", "arrayrecord")}


@pytest.fixture
def in_process(monkeypatch):
  """prepare writes shards in this process, one after the other."""

  def run(jobs, done, blocks, processes):
    return {name: preparation.write(name, job) for name, job in jobs.items()}

  monkeypatch.setattr(preparation, "_run", run)
