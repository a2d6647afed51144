"""Tokenizes a corpus once, into ArrayRecord files of ids that training reads in any order.

  python -m mc_jax.data.prepare --source=jsonl --paths='corpus/*.jsonl.zst' --out=tokens --train_bpe=32768
  python -m mc_jax.data.prepare --source=parquet --paths=gs://bucket/fineweb --tokenizer=tokenizer.json --out=tokens

Then train with --config.data.source=tokens --config.data.paths=tokens --config.data.tokenizer=tokens/tokenizer.json
--config.data.packing.method=best_fit. After an interruption, the same command resumes: shards are written atomically,
and their documents are fixed at the start.
"""

from __future__ import annotations

import os
import time

from absl import flags

from mc_jax import cli, storage
from mc_jax.data import learning, lock, preparation
from mc_jax.data.config import ERRORS, TEXTS, SourceConfig
from mc_jax.errors import ConfigError

_SOURCE = flags.DEFINE_enum("source", "text", TEXTS, "Format of the corpus.")
_PATHS = flags.DEFINE_string("paths", "", "Corpus: files, folders or globs, separated by commas; also gs://.")
_FIELD = flags.DEFINE_string("field", "text", "JSON field or Parquet column that holds the text.")
_OUT = cli.path_flag("out", None, "Folder for the tokenized corpus; created if missing.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer: bytes, a tokenizer.json, or a SentencePiece *.model.")
_TRAIN_BPE = flags.DEFINE_integer(
  "train_bpe", None, "Number of ids of a byte-level BPE to learn, instead of --tokenizer.", lower_bound=257
)
_TRAIN_BYTES = flags.DEFINE_integer(
  "train_bytes", 100_000_000, "Bytes of text that --train_bpe learns from.", lower_bound=1
)
_SEPARATOR = flags.DEFINE_string("separator", "", "Token between documents; default: the tokenizer's own.")
_SHARDS = flags.DEFINE_integer("shards", 0, "Number of files; default: one per 64 MB of the corpus, at least 8.")
_PROCESSES = flags.DEFINE_integer("processes", os.cpu_count(), "Number of processes that tokenize.", lower_bound=1)
_ON_ERROR = flags.DEFINE_enum("on_error", "stop", ERRORS, "What to do at a malformed document.")
_SUMS = {"documents": "documents", "text_bytes": "bytes of text", "tokens": "tokens", "skipped": "skipped"}


def main(_: list[str]) -> None:
  """Prepares the corpus of the flags."""
  named = {f"data.{name}": f"--{name}" for name in ("source", "paths", "field", "tokenizer", "separator")}
  with cli.naming(named | {"on_error=skip": "--on_error=skip"}):
    _checked()


def _checked() -> None:
  """Checks the flags, and prepares the corpus while it holds the folder's lock."""
  source = SourceConfig(source=_SOURCE.value, paths=_PATHS.value, field=_FIELD.value)
  if problems := source.source_problems("data", length=1):
    raise ConfigError("\n".join(problems))
  if (_TOKENIZER.value is None) == (_TRAIN_BPE.value is None):
    raise ConfigError("give one of --tokenizer and --train_bpe")
  if _TRAIN_BPE.value is None and flags.FLAGS["train_bytes"].present:
    raise ConfigError("--train_bytes is read only with --train_bpe")
  with lock.take(storage.path(_OUT.value), "prepares", "use another --out"):
    _prepare(source)


def _prepare(source: SourceConfig) -> None:
  """Learns the tokenizer if --train_bpe is given, prepares the corpus, and prints its size and the time."""
  name = _TOKENIZER.value
  if _TRAIN_BPE.value:
    name = str(storage.path(_OUT.value) / learning.FILE)
    begin = time.monotonic()
    print("learning the tokenizer, unless the folder has it ...", flush=True)
    ids = learning.learn(source, _TRAIN_BPE.value, _TRAIN_BYTES.value, _OUT.value, _ON_ERROR.value)
    if ids is not None:
      fewer = ": the text has no more pairs" if ids < _TRAIN_BPE.value else ""
      print(f"learned {ids:,} of {_TRAIN_BPE.value:,} ids in {time.monotonic() - begin:.0f} s{fewer}", flush=True)
  begin = time.monotonic()
  manifest = preparation.prepare(
    source,
    _OUT.value,
    name,
    separator=_SEPARATOR.value,
    shards=_SHARDS.value,
    processes=_PROCESSES.value,
    on_error=_ON_ERROR.value,
  )
  seconds = time.monotonic() - begin
  sums = {field: sum(getattr(shard, field) for shard in manifest.shards) for field in _SUMS}
  print(", ".join(f"{value:,} {words}" for value, words in zip(sums.values(), _SUMS.values(), strict=True)))
  print(f"{sums['text_bytes'] / max(sums['tokens'], 1):.2f} bytes a token; {seconds:.1f} s; {_OUT.value}")


if __name__ == "__main__":
  flags.mark_flag_as_required("out")
  cli.run(main, outlives_output=True)
