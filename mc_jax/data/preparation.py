"""A corpus of text, tokenized once into ArrayRecord files of ids that training reads in any order.

Which documents a file holds is settled at the start, and a file is in place whole or not at all: what was killed goes
on without losing or repeating a document.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import tqdm
from etils import epath

from mc_jax.data import formats, manifests, tokenizers, whole, workers
from mc_jax.data.config import SourceConfig
from mc_jax.data.documents import Documents, Order
from mc_jax.data.errors import ConfigError
from mc_jax.data.formats import Block, Malformed
from mc_jax.data.manifests import Shard
from mc_jax.data.tokenizers import Tokenizer

PLAN = "plan.json"
_PARTIAL = ".partial-"  # folders of files that are being written
_BATCH = 1 << 20  # characters that are tokenized together
_SHARD = 64 << 20  # bytes of the corpus in a shard, where nothing is said


@dataclasses.dataclass(frozen=True)
class Job:
  """What a process needs to write a shard."""

  blocks: Sequence[Block]
  out: str
  tokenizer: str
  separator: str
  dtype: str
  on_error: str


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
  """Tokenizes a corpus, or what is left of it, and returns its manifest.

  Args:
    source: of text.
    out: folder, also in a bucket. What it has of the same corpus, tokenizer and shards stays.
    tokenizer: see tokenizers.load.
    separator: see tokenizers.load.
    shards: files to write; 0: one per 64 MB, at least 8. Never more than there are blocks.
    processes: that tokenize, a shard each.
    on_error: "stop" at a malformed document, or "skip" and count it.

  Raises:
    ConfigError: bad input, or `out` holds something else.
  """
  folder = epath.Path(out).expanduser()
  loaded = tokenizers.load(tokenizer, separator)
  blocks = formats.blocks(source)
  parts = divide(blocks, shards or max(8, sum(block.size for block in blocks) // _SHARD))
  folder.mkdir(parents=True, exist_ok=True)
  for left in folder.glob(f"{_PARTIAL}*"):  # by a kill
    left.rmtree()
  _settle(folder, loaded, source, [[(b.name, b.first, b.count, b.size) for b in part] for part in parts])
  copy = _keep(folder, tokenizer)
  dtype = "<u2" if loaded.vocab_size <= 1 << 16 else "<u4"
  jobs = {
    f"tokens-{i:05d}-of-{len(parts):05d}.array_record": Job(part, str(folder), tokenizer, separator, dtype, on_error)
    for i, part in enumerate(parts)
  }
  done = {name: shard for name in jobs if (shard := _read(folder, name)) is not None}
  done |= _run({name: job for name, job in jobs.items() if name not in done}, done, blocks, processes)
  files = dict.fromkeys(block.name for block in blocks)
  manifest = manifests.Manifest(
    loaded.fingerprint, copy, loaded.vocab_size, dtype, tuple(files), tuple(done[name] for name in jobs)
  )
  manifests.write(folder, manifest)
  return manifest


def divide(blocks: Sequence[Block], shards: int) -> list[list[Block]]:
  """Blocks in so many parts, or as many as there are blocks, in order, of about the same size."""
  parts: list[list[Block]] = [[] for _ in range(shards)]
  total, before = sum(block.size for block in blocks), 0
  for block in blocks:
    parts[min(shards - 1, before * shards // max(total, 1))].append(block)
    before += block.size
  return [part for part in parts if part]


def train(source: SourceConfig, vocab_size: int, most: int, path: epath.Path) -> None:
  """Learns a BPE from `most` bytes of a corpus, taken from all of it, and writes it all or nothing."""
  documents = Documents(formats.blocks(source), tokenizers.Bytes(), "skip")
  with tempfile.TemporaryDirectory() as folder:
    temporary = epath.Path(folder) / path.name
    tokenizers.train_bpe(_sample(documents, most), vocab_size, temporary)
    whole.write(path, temporary.read_bytes())


def _sample(documents: Documents, most: int) -> Iterator[str]:
  order = Order(documents.counts, 0, documents.scattered)
  for i in range(len(documents)):
    if most <= 0:
      return
    text = documents.text(order[i]) or ""
    most -= len(text.encode())
    yield text


def _settle(folder: epath.Path, tokenizer: Tokenizer, source: SourceConfig, parts: list) -> None:
  """Writes what is to be done, or checks that it is what was begun."""
  plan = json.dumps({"tokenizer": tokenizer.fingerprint, "field": source.field, "shards": parts}) + "\n"
  path = folder / PLAN
  if not path.exists():
    whole.write(path, plan)
  elif path.read_text(encoding="utf-8") != plan:
    raise ConfigError(
      f"{folder} holds another tokenized corpus, whole or begun: its files, tokenizer, field or shards differ. "
      "Use another --out, or delete that folder"
    )


def _keep(folder: epath.Path, tokenizer: str) -> str:
  """Puts a copy of the tokenizer into the folder; its name, "" for bytes."""
  if tokenizer == "bytes":
    return ""
  name = "tokenizer.model" if tokenizer.endswith(".model") else "tokenizer.json"
  data = tokenizers.read(tokenizer)
  if not (folder / name).exists() or (folder / name).read_bytes() != data:
    whole.write(folder / name, data)
  return name


def _record(folder: epath.Path, name: str) -> epath.Path:
  return folder / f".{name}.json"


def _read(folder: epath.Path, name: str) -> Shard | None:
  """A shard that is done: what is said of it is written last."""
  path = _record(folder, name)
  return Shard(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() and (folder / name).exists() else None


def _run(jobs: dict[str, Job], done: dict[str, Shard], blocks: Sequence[Block], processes: int) -> dict[str, Shard]:
  """Writes shards in so many processes, with a bar of the documents."""
  context = multiprocessing.get_context("spawn")  # a tokenizer's threads do not survive a fork
  count = context.Value("q", sum(block.count for block in blocks) - sum(_documents(job) for job in jobs.values()))
  found = {}
  with (
    tqdm.tqdm(total=sum(block.count for block in blocks), unit=" documents", unit_scale=True) as bar,
    concurrent.futures.ProcessPoolExecutor(
      max(1, min(processes, len(jobs))), context, initializer=_start, initargs=(count,)
    ) as pool,
  ):
    waiting = {pool.submit(write, name, job): name for name, job in jobs.items()}
    try:
      while waiting:
        finished, _ = concurrent.futures.wait(waiting, 0.5, concurrent.futures.FIRST_COMPLETED)
        for future in finished:
          found[waiting.pop(future)] = future.result()
        bar.update(count.value - bar.n)
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
    bar.update(count.value - bar.n)
  return found


def _documents(job: Job) -> int:
  return sum(block.count for block in job.blocks)


_count = None  # documents done by all processes


def _start(count) -> None:
  global _count
  _count = count
  workers.follow_parent()
  os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already


def write(name: str, job: Job) -> Shard:
  """Writes a shard: its file first, whole or not at all, then what it holds."""
  from array_record.python import array_record_module

  folder = epath.Path(job.out)
  tokenizer = tokenizers.load(job.tokenizer, job.separator)
  documents = tokens = text_bytes = skipped = 0
  with tempfile.TemporaryDirectory(dir=None if "://" in job.out else job.out, prefix=_PARTIAL) as temporary:
    path = os.path.join(temporary, name)
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")  # read one by one, at random
    for texts in _batches(_texts(job)):
      known = [text for text in texts if text]
      skipped += sum(text is None for text in texts)
      for ids in tokenizer.encode(known):
        writer.write(ids.astype(job.dtype).tobytes())
        tokens += len(ids)
      documents += len(known)
      text_bytes += sum(len(text.encode()) for text in known)
      if _count is not None:
        with _count.get_lock():
          _count.value += len(texts)
    writer.close()
    size = os.path.getsize(path)
    if "://" in job.out:
      epath.Path(path).copy(folder / name, overwrite=True)
    else:
      os.replace(path, folder / name)
  shard = Shard(name, documents, tokens, text_bytes, size, skipped)
  whole.write(_record(folder, name), json.dumps(dataclasses.asdict(shard)))
  return shard


def _texts(job: Job) -> Iterator[str | None]:
  """The documents of a shard, in order; None is one that is skipped."""
  for block in job.blocks:
    content = block.read()
    for i in range(block.count):
      try:
        yield block.document(content, i)
      except Malformed as error:
        if job.on_error == "stop":
          raise ConfigError(f"{error}. --on_error=skip leaves such documents out") from error
        yield None


def _batches(texts: Iterable[str | None]) -> Iterator[list[str | None]]:
  batch, size = [], 0
  for text in texts:
    batch.append(text)
    size += len(text or "")
    if size >= _BATCH:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch
