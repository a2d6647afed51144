"""A run's data from its configuration: checked, split, and ready to draw batches from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import numpy as np

from mc_jax.data import files, formats, identity, ngram, packing, recall, sources, streams, tokenizers, windows
from mc_jax.data.config import FORMATS, TASKS, DataConfig, PartConfig
from mc_jax.data.documents import Documents, Order
from mc_jax.data.identity import Identity
from mc_jax.data.loader import Batches
from mc_jax.data.packing import Row
from mc_jax.data.tokenizers import Tokenizer
from mc_jax.data.windows import Batch
from mc_jax.errors import ConfigError

_TASK_ROWS = 64  # validation rows of a task with data.validation_tokens=0
_PROMPT = 64  # tokens


@dataclasses.dataclass(frozen=True)
class Validation:
  """The validation batches of a source, the same at every evaluation.

  Attributes:
    batches: The batches.
    count: The loss's divisor: bytes of the scored text, plus one for the end of each document; for a task, answer
      tokens.
    unit: "byte" or "answer".
  """

  batches: list[Batch]
  count: float
  unit: str = "byte"


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The data of a run.

  Attributes:
    config: The configuration.
    tokenizer: The tokenizer of the text and of samples.
    vocab_size: All ids are below it.
    training: A function from a virtual shard's number to its rows.
    validation: Validation batches by the name of the source.
    unit: The unit of losses: "byte", or "answer" (token) if all sources are tasks.
    units_per_token: Bytes per token of the validation text; 1 for tasks.
    prompt: int32 [up to 64], the beginning of the validation text or of a task's row.
    references: {name: bits per byte} of n-gram models; empty unless tokens are bytes and rows are windows.
    facts: Rows of the table that a run prints.
    identity: The files and tokenizer that were read, for resumed runs and for models trained on them.
  """

  config: DataConfig
  tokenizer: Tokenizer
  vocab_size: int
  training: Callable[[int], streams.Mixture]
  validation: dict[str, Validation]
  unit: str
  units_per_token: float
  prompt: np.ndarray
  references: dict[str, float]
  facts: dict[str, str]
  identity: Identity

  def batches(self, mesh: jax.sharding.Mesh) -> Batches:
    """The training batches on a mesh, starting with the first."""
    config = self.config
    shapes, packed = windows.shapes(config, mesh), config.packing.method != "windows"
    return Batches(self.training, config.virtual_shards, shapes, config.workers, packed, self.identity)


def load(config: DataConfig) -> Dataset:
  """Finds, checks and splits the data of a configuration.

  Raises:
    ConfigError: A setting or a file cannot be used; the error names it.
  """
  tokenizer = tokenizers.load(config.tokenizer, config.separator)
  if config.packing.method == "windows" and config.source in FORMATS:
    return _windows(config, tokenizer)
  return _mixture(config, tokenizer)


def _windows(config: DataConfig, tokenizer: Tokenizer) -> Dataset:
  """The data of a run that reads windows of all text."""
  corpus = sources.load(config)
  rows = windows.training(corpus.training, config)
  batches = windows.validation(corpus.validation, config)
  counted = {"training": corpus.training_files, "validation": corpus.validation_files}
  texts = {"training": corpus.training, "validation": corpus.validation}
  read = {file: digest for name in texts for file, digest in identity.of_stream(counted[name], texts[name]).items()}
  return Dataset(
    config=config,
    tokenizer=tokenizer,
    vocab_size=tokenizer.vocab_size,
    training=functools.partial(streams.windows, rows, config.virtual_shards),
    validation={config.source: Validation(batches, float(sum(batch["weights"].sum() for batch in batches)))},
    unit="byte",
    units_per_token=1.0,
    prompt=corpus.validation[:_PROMPT].astype(np.int32),
    references={
      "byte unigram": ngram.bits_per_byte(ngram.unigram(corpus.training), batches),
      "byte bigram": ngram.bits_per_byte(ngram.bigram(corpus.training), batches),
    },
    facts={f"{name} text": f"{len(texts[name]):,} bytes in {len(counted[name]):,} files" for name in texts},
    identity=Identity(tokenizer.fingerprint, {config.source: dict(sorted(read.items()))}),
  )


def _mixture(config: DataConfig, tokenizer: Tokenizer) -> Dataset:
  """The data of a run that reads packed documents and rows of tasks."""
  parts = config.parts
  documents = {
    name: Documents(_blocks(name, source, config, tokenizer), tokenizer, config.on_error)
    for name, source in parts.items()
    if source.source in FORMATS
  }
  tasks = {name: _task(source, config, tokenizer) for name, source in parts.items() if source.source in TASKS}
  if not any(source.trains for source in parts.values()):
    raise ConfigError("data.sources: none has a weight above 0 and a split that is not validation")
  validation = {}
  for name, source in parts.items():
    if source.split != "training":
      share = -(-config.validation_tokens // len(parts))
      rows, count = _validation_rows(documents.get(name), tasks.get(name), source, config, share, name)
      batches = windows.batches(rows, config.batch_size)
      validation[name] = Validation(batches, count, "byte" if name in documents else "answer")
  if not validation:
    raise ConfigError("data.sources: none is held out for validation: one needs a split of both or validation")
  orders = {name: Order(source.counts, config.seed, source.scattered) for name, source in documents.items()}
  sizes = [tokenizer.vocab_size] * bool(documents) + [
    parts[name].task.vocab_size or tokenizer.vocab_size for name in tasks
  ]
  unit = "byte" if any(source.unit == "byte" for source in validation.values()) else "answer"
  in_unit = [source for source in validation.values() if source.unit == unit]
  scored = sum(float(batch["weights"].sum()) for source in in_unit for batch in source.batches)
  first = in_unit[0].batches[0]
  facts = {"tokenizer": f"{config.tokenizer}, {tokenizer.vocab_size:,} ids"} if documents else {}
  weights = sum(source.weight for source in parts.values() if source.trains)
  for name, source in parts.items():
    what = f"{source.source}, {len(documents[name]):,} documents" if name in documents else source.source
    share = f"{source.weight / weights:.0%} of the rows" if source.trains else "validation"
    facts[f"source {name}"] = f"{what}, {share}"
  return Dataset(
    config=config,
    tokenizer=tokenizer,
    vocab_size=max(sizes),
    training=functools.partial(_shard, config, documents, orders, tasks),
    validation=validation,
    unit=unit,
    units_per_token=sum(source.count for source in in_unit) / scored,
    prompt=first["tokens"][0, first["segment_ids"][0] == 1][:_PROMPT],
    references={},
    facts=facts,
    identity=Identity(
      tokenizer.fingerprint if config.has_text else None,
      {name: identity.of_blocks(source.blocks) for name, source in documents.items()}
      | {name: identity.of_texts(_prose(parts[name].paths)) for name in tasks if parts[name].paths},
    ),
  )


def _shard(config: DataConfig, documents: dict, orders: dict, tasks: dict, shard: int) -> streams.Mixture:
  """The rows of a virtual shard."""
  weighted = {}
  for name, source in config.parts.items():
    if not source.trains:
      continue
    if name in documents:
      key = (config.seed, name, "long")
      stream = streams.packed(documents[name], orders[name], source, config, key, shard)
    else:
      row = tasks[name]
      stream = streams.Counted(lambda number, row=row, name=name: row((config.seed, name, shard, number)))
    weighted[name] = (stream, source.weight)
  return streams.Mixture(weighted, (config.seed, "mixture", shard))


def _blocks(name: str, source: PartConfig, config: DataConfig, tokenizer: Tokenizer) -> list[formats.Block]:
  try:
    return formats.blocks(source, tokenizer.fingerprint)
  except ConfigError as error:
    if config.source != "mixture":
      raise
    raise ConfigError(f"data.sources.{name}: {error}") from error


def _task(source: PartConfig, config: DataConfig, tokenizer: Tokenizer) -> Callable[[tuple], Row]:
  """A function from a key to the row of a recall task that it determines."""
  task, options = recall.TASKS[source.source], {}
  if task.reads_text:
    options["encode"] = functools.partial(_encode, tokenizer)
    if source.paths:
      options["words"] = recall.prose.words(_texts(source.paths))

  def row(key: tuple) -> Row:
    arrays = task.row(source.task, config.length, streams.generator(*key), **options)
    answers = np.flatnonzero(arrays["weights"])
    return {**arrays, "segment_ids": (np.arange(config.length) <= answers.max(initial=0)).astype(np.int32)}

  return row


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
  try:
    return tokenizer.encode([text])[0]
  except ValueError as error:
    raise ConfigError(f"data.tokenizer cannot take the text of niah: {error}") from error


def _prose(paths: str) -> dict[str, str]:
  return files.find(paths, field="paths of niah")


def _texts(paths: str) -> Iterable[bytes]:
  for url in _prose(paths).values():
    with files.reading(url) as file:
      yield sources.plain(file.read())


def _validation_rows(
  documents: Documents | None,
  task: Callable[[tuple], Row] | None,
  source: PartConfig,
  config: DataConfig,
  tokens: int,
  name: str,
) -> tuple[list[Row], float]:
  """The held-out rows of a source, and the divisor of their loss (see Validation).

  There is at least one row, and otherwise at most `tokens` tokens; 0 is no limit.
  """
  most = max(1, tokens // config.length) if tokens else None
  if task is not None:
    rows = [task((config.seed, name, "validation", number)) for number in range(most or _TASK_ROWS)]
    return rows, float(sum(row["weights"].sum() for row in rows))
  chosen, sizes, total = {}, {}, 0
  order = Order(documents.counts, config.seed + 1, documents.scattered)
  for i in (order[number] for number in range(len(documents))):
    if source.split == "both" and not sources.held_out(documents.name(i), config.validation_fraction, config.seed):
      continue
    ids = documents[i]
    if len(ids):
      chosen[i], sizes[i] = ids, documents.text_bytes(i)
      total += len(ids) - 1
    if most and total >= most * config.length:
      break
  if not chosen:
    raise ConfigError(
      f"the validation split of {name} would be empty: of {len(documents)} document(s), a hash of their names holds "
      f"out data.validation_fraction={config.validation_fraction}. Give it more documents, change "
      "data.validation_fraction (between 0 and 1), or try another data.seed"
    )
  rows = packing.rows(list(chosen.values()), config.length, config.packing.align)[:most]
  left, count = int(sum(row["weights"].sum() for row in rows)), 0
  for i, ids in chosen.items():  # in the order of the rows: only the last one can be cut
    targets = len(ids) - 1
    count += sizes[i] + 1 if left >= targets else documents.text_bytes(i, max(left, 0))
    left -= targets
  return rows, float(count)
