"""Tokenizes a corpus of text once, into ArrayRecord files of ids that training reads in any order.

The documents of each file are fixed at the start, and files are written atomically, so an interrupted preparation
resumes without losing or repeating a document.
"""

from __future__ import annotations

import concurrent.futures.process
import dataclasses
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tqdm
from etils import epath

from mc_jax import storage
from mc_jax.data import formats, manifests, tokenizers, workers
from mc_jax.data.config import SourceConfig
from mc_jax.data.documents import SKIP, encode
from mc_jax.data.formats import Block, Malformed
from mc_jax.data.manifests import Shard
from mc_jax.data.tokenizers import Tokenizer
from mc_jax.errors import ConfigError

_PARTIAL = ".partial-"  # prefix of folders with files that are being written
_EVERY = 30.0  # seconds between two lines about progress
_BATCH = 1 << 20  # characters to tokenize together
_SHARD = 64 << 20  # default number of bytes of the corpus in a shard


@dataclasses.dataclass(frozen=True)
class Job:
  """The work of writing one shard."""

  blocks: Sequence[Block]  # blocks whose documents the shard will hold
  out: str  # folder of the corpus
  tokenizer: str  # see tokenizers.load
  separator: str  # see tokenizers.load
  dtype: str  # dtype of the ids, "<u2" or "<u4"
  on_error: str  # "stop" or "skip"


def prepare(
  source: SourceConfig,
  out: str,
  tokenizer: str,
  *,
  separator: str = "",
  shards: int = 0,
  processes: int = 1,
  on_error: str = "stop",
) -> manifests.Manifest:
  """Tokenizes a corpus, or the shards of it that are missing, and returns its manifest.

  Args:
    source: A source of text.
    out: The folder of the tokenized corpus, on this machine or in a bucket. Finished shards of the same corpus and
      tokenizer are kept.
    tokenizer: See tokenizers.load.
    separator: See tokenizers.load.
    shards: The number of files to write, at most one per block; 0: one per 64 MB, at least 8.
    processes: The number of processes that tokenize, one shard each at a time.
    on_error: "stop" at a malformed document, or "skip" and count it.

  Raises:
    ConfigError: The input is malformed or has no text, or `out` holds another corpus.
    OSError: A process was killed, or the disk is full.
  """
  folder = storage.path(out)
  loaded = tokenizers.load(tokenizer, separator)
  blocks = formats.blocks(source)
  parts = divide(blocks, shards or max(8, sum(block.size for block in blocks) // _SHARD))
  folder.mkdir(parents=True, exist_ok=True)
  for partial in folder.glob(f"{_PARTIAL}*"):  # left by a process that was killed
    partial.rmtree()
  _fix_plan(folder, loaded, source, [[(b.name, b.first, b.count, b.size) for b in part] for part in parts])
  copy = _copy_tokenizer(folder, tokenizer)
  dtype = "<u2" if loaded.vocab_size <= 1 << 16 else "<u4"
  jobs = {
    f"tokens-{i:05d}-of-{len(parts):05d}.array_record": Job(part, str(folder), tokenizer, separator, dtype, on_error)
    for i, part in enumerate(parts)
  }
  done = {name: shard for name in jobs if (shard := _read(folder, name)) is not None}
  done |= _run({name: job for name, job in jobs.items() if name not in done}, done, blocks, processes)
  if not any(shard.documents for shard in done.values()):
    skipped, total = sum(shard.skipped for shard in done.values()), sum(block.count for block in blocks)
    raise ConfigError(
      f"{source.paths!r} holds no text: {skipped:,} of {total:,} documents are malformed and were skipped, and all "
      "others are empty"
    )
  names = dict.fromkeys(block.name for block in blocks)
  manifest = manifests.Manifest(
    loaded.fingerprint, copy, loaded.vocab_size, dtype, tuple(names), tuple(done[name] for name in jobs)
  )
  manifests.write(folder, manifest)
  return manifest


def divide(blocks: Sequence[Block], shards: int) -> list[list[Block]]:
  """Divides blocks, in order, into `shards` parts of about the same size, or fewer if there are fewer blocks."""
  parts: list[list[Block]] = [[] for _ in range(shards)]
  total, before = sum(block.size for block in blocks), 0
  for block in blocks:
    parts[min(shards - 1, before * shards // max(total, 1))].append(block)
    before += block.size
  return [part for part in parts if part]


def _fix_plan(folder: epath.Path, tokenizer: Tokenizer, source: SourceConfig, parts: list) -> None:
  """Writes the plan of the shards. Raises ConfigError if the folder has a different one."""
  plan = json.dumps({"tokenizer": tokenizer.fingerprint, "field": source.field, "shards": parts})
  path = folder / manifests.PLAN
  if not path.exists():
    storage.write(path, plan + "\n")
    return
  try:
    lines = list(_differences(json.loads(path.read_bytes()), json.loads(plan)))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ConfigError(f"{path} is not a plan of mc_jax.data.prepare: {error!r}") from error
  if lines:
    raise ConfigError(
      f"{folder} holds another tokenized corpus, finished or not: {'; '.join(lines)}. Use another --out, or delete "
      "that folder"
    )


def _differences(then: dict, now: dict) -> Iterator[str]:
  """Lines about the flags in which two plans differ."""
  (old, _, old_separator), (new, _, new_separator) = (plan["tokenizer"].partition("/") for plan in (then, now))
  if old != new:
    yield f"--tokenizer was {_short(old)} and is now {_short(new)}"
  elif old_separator != new_separator:
    yield f"--separator was id {old_separator} and is now id {new_separator}"
  if then["field"] != now["field"]:
    yield f"--field was {then['field']} and is now {now['field']}"
  before, after = ([block for part in plan["shards"] for block in part] for plan in (then, now))
  if before != after:
    sizes = [f"{sum(block[2] for block in plan):,} documents in {_files(plan):,} files" for plan in (before, after)]
    first = next(b or a for a, b in itertools.zip_longest(before, after) if a != b)
    yield f"--paths were {sizes[0]} and are now {sizes[1]}, which differ first in {first[0]}"
  elif then["shards"] != now["shards"]:
    yield f"--shards was {len(then['shards'])} and is now {len(now['shards'])}"


def _short(fingerprint: str) -> str:
  return fingerprint if fingerprint == "bytes" else f"a file of SHA-256 {fingerprint[:12]}"


def _files(blocks: list) -> int:
  """The number of files that a plan's blocks come from."""
  return len({block[0] for block in blocks})


def _copy_tokenizer(folder: epath.Path, tokenizer: str) -> str:
  """Copies the tokenizer into the folder and returns the copy's name; "" for bytes."""
  if tokenizer == "bytes":
    return ""
  name = "tokenizer.model" if tokenizer.endswith(".model") else "tokenizer.json"
  data = tokenizers.read(tokenizer)
  if not (folder / name).exists() or (folder / name).read_bytes() != data:
    storage.write(folder / name, data)
  return name


def _record(folder: epath.Path, name: str) -> epath.Path:
  """The file that describes a finished shard."""
  return folder / f".{name}.json"


def _read(folder: epath.Path, name: str) -> Shard | None:
  """The description of a shard, which is written last; None if the shard is not finished."""
  path = _record(folder, name)
  return Shard(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() and (folder / name).exists() else None


def _run(jobs: dict[str, Job], done: dict[str, Shard], blocks: Sequence[Block], processes: int) -> dict[str, Shard]:
  """Writes shards in `processes` processes, with a progress bar on a terminal and a line every 30 seconds elsewhere.

  Args:
    jobs: The missing shards, by name.
    done: The finished shards, by name.
    blocks: All blocks of the corpus.
    processes: The number of processes.

  Returns:
    The shards of `jobs`, by name.

  Raises:
    OSError: A process was killed.
  """
  context = multiprocessing.get_context("spawn")  # a tokenizer's threads do not survive a fork
  count = context.Value("q", sum(block.count for block in blocks) - sum(_documents(job) for job in jobs.values()))
  total, before, begin, written = sum(block.count for block in blocks), count.value, time.monotonic(), {}
  reported = begin
  with (
    tqdm.tqdm(total=total, unit=" documents", unit_scale=True, disable=None) as bar,  # None: drawn on terminals only
    concurrent.futures.ProcessPoolExecutor(
      max(1, min(processes, len(jobs))), context, initializer=_start, initargs=(count,)
    ) as pool,
  ):
    waiting = {pool.submit(write, name, job): name for name, job in jobs.items()}
    try:
      while waiting:
        finished, _ = concurrent.futures.wait(waiting, 0.5, concurrent.futures.FIRST_COMPLETED)
        bar.update(count.value - bar.n)
        if bar.disable and (now := time.monotonic()) >= reported + _EVERY and count.value > before:
          reported, left = now, (now - begin) / (count.value - before) * (total - count.value)
          print(f"{count.value:,} of {total:,} documents, {bar.format_interval(left)} left", flush=True)
        for future in finished:
          written[waiting.pop(future)] = future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
      raise OSError(
        "a tokenizing process was killed, perhaps because memory ran out: run the same command again with fewer "
        "--processes"
      ) from error
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
  return written


def _documents(job: Job) -> int:
  return sum(block.count for block in job.blocks)


_count = None  # shared number of documents that all processes have done


def _start(count) -> None:
  """Initialises a worker process."""
  global _count
  _count = count
  workers.follow_parent()
  os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already use all cores


def write(name: str, job: Job) -> Shard:
  """Writes a shard's file atomically, then its description, and returns the description."""
  from array_record.python import array_record_module

  folder = epath.Path(job.out)
  tokenizer = tokenizers.load(job.tokenizer, job.separator)
  skipped = tokens = 0
  lengths = []  # UTF-8 bytes of each document
  with tempfile.TemporaryDirectory(dir=None if storage.in_bucket(job.out) else job.out, prefix=_PARTIAL) as temporary:
    path = os.path.join(temporary, name)
    # Training reads single records in random order.
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
    for batch in _batches(_texts(job)):
      texts = {place: text for place, text in batch if isinstance(text, str) and text}
      encoded = encode(tokenizer, list(texts.values()), list(texts))
      for text, ids in zip(texts.values(), encoded, strict=True):
        if isinstance(ids, Malformed):
          skipped += _skipped(ids, job.on_error)
          continue
        writer.write(ids.astype(job.dtype).tobytes())
        tokens += len(ids)
        lengths.append(len(text.encode()))
      skipped += sum(_skipped(text, job.on_error) for _, text in batch if isinstance(text, Malformed))
      if _count is not None:
        with _count.get_lock():
          _count.value += len(batch)
    writer.close()
    size = os.path.getsize(path)
    lengths_name = manifests.lengths(name)
    np.asarray(lengths, manifests.LENGTHS).tofile(os.path.join(temporary, lengths_name))
    for file in (lengths_name, name):  # the shard last, so that it is never without its lengths
      if storage.in_bucket(job.out):
        epath.Path(temporary, file).copy(folder / file, overwrite=True)
      else:
        os.replace(os.path.join(temporary, file), folder / file)
  shard = Shard(name, len(lengths), tokens, sum(lengths), size, skipped, lengths_name)
  storage.write(_record(folder, name), json.dumps(dataclasses.asdict(shard)))
  return shard


def _texts(job: Job) -> Iterator[tuple[str, str | Malformed]]:
  """(place, text) of each document of a shard, in order; for a malformed document, (place, error)."""
  for block in job.blocks:
    content = block.read()
    for i in range(block.count):
      try:
        yield block.place(i), block.document(content, i)
      except Malformed as error:
        yield block.place(i), error


def _skipped(error: Malformed, on_error: str) -> int:
  """1, to count a skipped document. Raises ConfigError with on_error="stop"."""
  if on_error == "stop":
    raise ConfigError(f"{error}. {SKIP}") from error
  return 1


def _batches(texts: Iterable[tuple[str, str | Malformed]]) -> Iterator[list[tuple[str, str | Malformed]]]:
  """Lists of consecutive documents with about _BATCH characters each."""
  batch, size = [], 0
  for place, text in texts:
    batch.append((place, text))
    size += len(text) if isinstance(text, str) else 0
    if size >= _BATCH:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch
