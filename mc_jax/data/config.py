"""The configuration of a run's data: sources, split, packing and batches."""

from __future__ import annotations

import dataclasses

from mc_jax.data import recall
from mc_jax.data.recall.copying import CopyingConfig
from mc_jax.data.recall.facts import FactsConfig
from mc_jax.data.recall.mqar import MQARConfig
from mc_jax.data.recall.niah import NIAHConfig

TEXTS = ("stdlib", "text", "jsonl", "parquet", "arrayrecord")  # sources of text, which is tokenized
FORMATS = (*TEXTS, "tokens")  # sources of documents
TASKS = ("mqar", "niah", "copying", "facts")  # sources of whole rows, generated from a seed: see data/recall
SOURCES = (*FORMATS, *TASKS)
SPLITS = ("both", "training", "validation")
METHODS = ("windows", "concat", "best_fit")
ERRORS = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """A source of documents or rows.

  A long document has at least `long_tokens` tokens. With long_weight above 1, each epoch keeps a shorter document with
  probability 1 / long_weight, drawn anew in every epoch.
  """

  source: str = "stdlib"  # "stdlib": Python's standard library; others: files of this format, or a recall task
  paths: str = ""  # files, folders or globs (also **), separated by commas; any URL of fsspec, such as gs://
  field: str = "text"  # field of a JSON object, or column of a Parquet table, with the text
  long_tokens: int = 8192  # length from which a document is long
  long_weight: float = 1.0  # how many times as often long documents are seen
  mqar: MQARConfig = dataclasses.field(default_factory=MQARConfig)
  niah: NIAHConfig = dataclasses.field(default_factory=NIAHConfig)  # `paths`, if any, are its prose
  copying: CopyingConfig = dataclasses.field(default_factory=CopyingConfig)
  facts: FactsConfig = dataclasses.field(default_factory=FactsConfig)

  @property
  def task(self) -> MQARConfig | NIAHConfig | CopyingConfig | FactsConfig | None:
    """The configuration of the recall task, if the source is one."""
    return getattr(self, self.source) if self.source in TASKS else None

  def source_problems(self, prefix: str, length: int) -> list[str]:
    """Every setting of the source that cannot work, one line each."""
    problems = []
    if self.source in FORMATS and self.source != "stdlib":
      if not any(path.strip() for path in self.paths.split(",")):
        problems.append(
          f"{prefix}.paths must be files, folders or globs separated by commas, such as 'books/*.txt', when "
          f"{prefix}.source is {self.source}, got {self.paths!r}"
        )
    elif self.source in SOURCES and self.source != "niah" and self.paths:
      problems.append(
        f"{prefix}.paths is not read by {prefix}.source={self.source}, got {self.paths!r}; "
        f"sources that read it are {', '.join(FORMATS[1:])}, niah"
      )
    if self.task is not None:
      problems += self.task.problems(f"{prefix}.{self.source}", length)
    if not self.field:
      problems.append(f"{prefix}.field must be the name of the field that holds the text, got {self.field!r}")
    if self.long_tokens < 1:
      problems.append(f"{prefix}.long_tokens must be at least 1, got {self.long_tokens!r}")
    if not self.long_weight >= 1:
      problems.append(f"{prefix}.long_weight must be at least 1, got {self.long_weight!r}")
    return problems


@dataclasses.dataclass(frozen=True)
class PartConfig(SourceConfig):
  """One of several sources in a mixture."""

  weight: float = 1.0  # its share of the training rows is weight / sum of all weights
  split: str = "both"  # "both": some documents are held out for validation; "training", "validation": all are

  @property
  def trains(self) -> bool:
    """Whether training rows are drawn from this source."""
    return self.split != "validation" and self.weight > 0


@dataclasses.dataclass(frozen=True)
class PackingConfig:
  """How documents are packed into rows."""

  method: str = "windows"  # "windows": stretches of all text from random positions (source stdlib or text, as bytes);
  # "concat": one document after the other, cut at the ends of rows; "best_fit": cuts only documents longer than a row
  align: int = 1  # documents start at multiples of this many tokens
  window: int = 32  # best_fit: number of rows to fill together

  def problems(self, prefix: str) -> list[str]:
    """Every setting that cannot work, one line each."""
    problems = []
    if self.method not in METHODS:
      problems.append(f"{prefix}.method must be one of {', '.join(METHODS)}, got {self.method!r}")
    for field in ("align", "window"):
      if getattr(self, field) < 1:
        problems.append(f"{prefix}.{field} must be at least 1, got {getattr(self, field)!r}")
    return problems


@dataclasses.dataclass(frozen=True)
class DataConfig(SourceConfig):
  """The sources, their split into training and validation, and the shape of a batch.

  A single source is described by the fields of SourceConfig. With source="mixture", `sources` has several under names
  of the user's choice.
  """

  sources: dict[str, PartConfig] = dataclasses.field(default_factory=dict)
  tokenizer: str = "bytes"  # "bytes", a Hugging Face tokenizer.json, or a SentencePiece *.model
  separator: str = ""  # token at the start and end of documents; "": the tokenizer's own
  packing: PackingConfig = dataclasses.field(default_factory=PackingConfig)
  length: int = 512  # tokens in a row
  batch_size: int = 16  # rows in an optimiser step, in all microbatches
  validation_fraction: float = 0.05  # share of documents (of files, with windows) held out, by a hash of their names
  validation_tokens: int = 131_072  # largest number of validation tokens to score; 0: all
  documents: bool = False  # packing.method=windows: separate files by segment_ids, so that nothing carries over
  seed: int = 0  # seed of the split and of the order of training rows
  shards: int = 0  # number of streams that rows are drawn from in turn; 0: batch_size. It affects the order
  workers: int = 0  # number of processes that prepare rows; 0: the trainer itself. It does not affect the order
  on_error: str = "stop"  # "stop" at a malformed document, or "skip" it with a warning
  allow_growth: bool = False  # whether a run may resume with more files, in another order of rows

  @property
  def parts(self) -> dict[str, PartConfig]:
    """The sources by name."""
    if self.source == "mixture":
      return self.sources
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(SourceConfig)}
    return {self.source: PartConfig(**fields)}

  @property
  def has_documents(self) -> bool:
    """Whether any source has documents, each between two separators."""
    return any(source.source in FORMATS for source in self.parts.values())

  @property
  def has_text(self) -> bool:
    """Whether any ids stand for text; those of some recall tasks are symbols."""
    tasks = (recall.TASKS[source.source] for source in self.parts.values() if source.source in TASKS)
    return self.has_documents or any(task.reads_text for task in tasks)

  @property
  def segments(self) -> bool:
    """Whether batches have segment_ids."""
    return self.documents if self.packing.method == "windows" else True

  @property
  def virtual_shards(self) -> int:
    """The number of streams that rows are drawn from in turn: row i of the run is from stream i modulo this."""
    return self.shards or self.batch_size

  @property
  def order(self) -> dict[str, object]:
    """The fields that, with the files, determine the order of rows and the held-out documents, {field: value}.

    A run can resume from a position only if these are unchanged.
    """
    packed = self.packing.method != "windows"
    fields: dict[str, object] = {"data.packing.method": self.packing.method}
    if packed or self.has_documents:
      fields["data.length"] = self.length
    if packed:
      fields |= {f"data.packing.{field}": getattr(self.packing, field) for field in ("align", "window")}
      fields["data.shards"] = self.virtual_shards
    if self.has_documents:
      fields |= {f"data.{field}": getattr(self, field) for field in ("seed", "validation_fraction")}
    fields["data.sources"] = [name for name, source in self.parts.items() if source.trains]
    for name, source in self.parts.items():
      prefix = f"data.sources.{name}" if self.source == "mixture" else "data"
      fields[f"{prefix}.source"] = source.source
      if source.source in FORMATS:
        fields[f"{prefix}.split"] = source.split
      if source.source in ("jsonl", "parquet"):
        fields[f"{prefix}.field"] = source.field
    return fields

  def problems(self, prefix: str = "data") -> list[str]:
    """Every setting that cannot work, one line each, naming the field and its valid values."""
    problems = []

    def require(condition: bool, field: str, valid: str) -> None:
      if not condition:
        problems.append(f"{prefix}.{field} must be {valid}, got {getattr(self, field)!r}")

    require(self.source in (*SOURCES, "mixture"), "source", f"one of {', '.join(SOURCES)}, mixture")
    if self.source == "mixture":
      require(bool(self.sources), "sources", "one or more named sources when source is mixture")
    elif self.sources:
      problems.append(
        f"{prefix}.sources is read only when {prefix}.source is mixture, got {prefix}.source={self.source}"
      )
    named = {f"{prefix}.sources.{name}": source for name, source in self.sources.items()}
    for name, source in named.items():
      if source.source not in SOURCES:
        problems.append(f"{name}.source must be one of {', '.join(SOURCES)}, got {source.source!r}")
      if source.split not in SPLITS:
        problems.append(f"{name}.split must be one of {', '.join(SPLITS)}, got {source.split!r}")
      if not source.weight >= 0:
        problems.append(f"{name}.weight must be at least 0, got {source.weight!r}")
    for name, source in (named or {prefix: self}).items():
      problems += source.source_problems(name, self.length)
      if self.packing.method == "windows" and source.source in FORMATS[2:]:
        problems.append(
          f"{prefix}.packing.method must be concat or best_fit for {name}.source={source.source}, got 'windows'"
        )
    if self.packing.method == "windows":
      if self.source == "mixture":
        problems.append(f"{prefix}.packing.method must be concat or best_fit for a mixture, got 'windows'")
      if self.tokenizer != "bytes":
        problems.append(f"{prefix}.packing.method must be concat or best_fit with {prefix}.tokenizer={self.tokenizer}")
    problems += (packing := self.packing.problems(f"{prefix}.packing"))
    if not packing and self.length % self.packing.align:
      problems.append(
        f"{prefix}.length must be a multiple of {prefix}.packing.align={self.packing.align}, got {self.length}"
      )
    require(bool(self.tokenizer), "tokenizer", "bytes, a tokenizer.json, or a SentencePiece *.model")
    require(self.length >= 1, "length", "at least 1")
    require(self.batch_size >= 1, "batch_size", "at least 1")
    require(0 < self.validation_fraction < 1, "validation_fraction", "between 0 and 1, both excluded")
    require(self.validation_tokens >= 0, "validation_tokens", "positive, or 0 for all")
    require(0 <= self.seed < 2**32, "seed", "between 0 and 2**32 - 1")
    require(self.shards >= 0, "shards", "at least 1, or 0 for as many as data.batch_size")
    require(self.workers >= 0, "workers", "at least 0")
    require(self.on_error in ERRORS, "on_error", f"one of {', '.join(ERRORS)}")
    return problems
