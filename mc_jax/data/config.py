"""What a run reads, and how it is cut into batches."""

from __future__ import annotations

import dataclasses

from mc_jax.data import recall
from mc_jax.data.recall.copying import CopyingConfig
from mc_jax.data.recall.mqar import MQARConfig
from mc_jax.data.recall.niah import NIAHConfig

TEXTS = ("stdlib", "text", "jsonl", "parquet", "arrayrecord")  # sources of text, which a tokenizer makes ids of
FORMATS = (*TEXTS, "tokens")  # sources of documents
TASKS = ("mqar", "niah", "copying")  # sources of whole rows, made from a seed: see data/recall
SOURCES = (*FORMATS, *TASKS)
SPLITS = ("both", "training", "validation")
METHODS = ("windows", "concat", "best_fit")
ERRORS = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """Where documents or rows come from.

  A long document is one of at least `long_tokens` tokens. Where long_weight is above 1, an epoch keeps shorter ones
  with a probability of 1 / long_weight, others in every epoch.
  """

  source: str = "stdlib"  # "stdlib": this Python's standard library; others: files of that format, or a task of recall
  paths: str = ""  # files, folders or globs (** included), separated by commas; anything fsspec opens, such as gs://
  field: str = "text"  # of a JSON object or a Parquet table: what holds the text
  long_tokens: int = 8192  # what is called long
  long_weight: float = 1.0  # so many times as often are long documents seen as others
  mqar: MQARConfig = dataclasses.field(default_factory=MQARConfig)
  niah: NIAHConfig = dataclasses.field(default_factory=NIAHConfig)  # `paths`, if any, are its prose
  copying: CopyingConfig = dataclasses.field(default_factory=CopyingConfig)

  @property
  def task(self) -> MQARConfig | NIAHConfig | CopyingConfig | None:
    """The configuration of the recall task that this source is, if it is one."""
    return getattr(self, self.source) if self.source in TASKS else None

  def source_problems(self, prefix: str, length: int) -> list[str]:
    """Every setting of the source that cannot work, one line each."""
    found = []
    if self.source in FORMATS and self.source != "stdlib":
      if not any(path.strip() for path in self.paths.split(",")):
        found.append(
          f"{prefix}.paths must be files, folders or globs separated by commas, such as 'books/*.txt', when "
          f"{prefix}.source is {self.source}, got {self.paths!r}"
        )
    elif self.source in SOURCES and self.source != "niah" and self.paths:
      found.append(
        f"{prefix}.paths is not read by {prefix}.source={self.source}, got {self.paths!r}; "
        f"it is by one of {', '.join(FORMATS[1:])}, niah"
      )
    if self.task is not None:
      found += self.task.problems(f"{prefix}.{self.source}", length)
    if not self.field:
      found.append(f"{prefix}.field must be the name of the field that holds the text, got {self.field!r}")
    if self.long_tokens < 1:
      found.append(f"{prefix}.long_tokens must be at least 1, got {self.long_tokens!r}")
    if not self.long_weight >= 1:
      found.append(f"{prefix}.long_weight must be at least 1, got {self.long_weight!r}")
    return found


@dataclasses.dataclass(frozen=True)
class PartConfig(SourceConfig):
  """One of several sources that a run mixes."""

  weight: float = 1.0  # its share of the training rows is weight / the sum of all weights
  split: str = "both"  # "both": some documents are held out for validation; or all are for "training" or "validation"

  @property
  def trains(self) -> bool:
    """Whether training rows come from here."""
    return self.split != "validation" and self.weight > 0


@dataclasses.dataclass(frozen=True)
class PackingConfig:
  """How documents fill rows."""

  method: str = "windows"  # "windows": stretches of all text, from random places (source stdlib or text, as bytes);
  # "concat": one document after the other, cut where a row ends; "best_fit": only documents longer than a row are cut
  align: int = 1  # documents start at a multiple of so many tokens
  window: int = 32  # best_fit: rows that are filled together

  def problems(self, prefix: str) -> list[str]:
    """Every setting that cannot work, one line each."""
    found = []
    if self.method not in METHODS:
      found.append(f"{prefix}.method must be one of {', '.join(METHODS)}, got {self.method!r}")
    for field in ("align", "window"):
      if getattr(self, field) < 1:
        found.append(f"{prefix}.{field} must be at least 1, got {getattr(self, field)!r}")
    return found


@dataclasses.dataclass(frozen=True)
class DataConfig(SourceConfig):
  """The sources, their split into training and validation, and the shape of a batch.

  One source is named by the fields of SourceConfig. Several are named in `sources`, whose keys are names of your
  choice: then source is "mixture".
  """

  sources: dict[str, PartConfig] = dataclasses.field(default_factory=dict)
  tokenizer: str = "bytes"  # "bytes", a Hugging Face tokenizer.json, or a SentencePiece *.model
  separator: str = ""  # token at the start and at the end of a document; "": the tokenizer's own
  packing: PackingConfig = dataclasses.field(default_factory=PackingConfig)
  length: int = 512  # tokens in a row
  batch_size: int = 16  # rows in an optimiser step, all microbatches together
  validation_fraction: float = 0.05  # of the documents (of the files, where windows cut them), by a hash of their names
  validation_tokens: int = 131_072  # at most this many validation tokens are scored; 0: all
  documents: bool = False  # packing.method=windows: mark files with segment_ids, so that nothing carries over
  seed: int = 0  # of the split and of the order of training rows
  shards: int = 0  # streams that rows are drawn from in turn; 0: batch_size. Another number is another order
  workers: int = 0  # processes that prepare rows; 0: none but the trainer. The order does not depend on it
  on_error: str = "stop"  # what a malformed document does: "stop" the run, or be "skip"ped with a warning
  allow_growth: bool = False  # a run may resume on the files of its checkpoint and others, in another order of rows

  @property
  def parts(self) -> dict[str, PartConfig]:
    """The sources by name, one or several."""
    if self.source == "mixture":
      return self.sources
    own = {field.name: getattr(self, field.name) for field in dataclasses.fields(SourceConfig)}
    return {self.source: PartConfig(**own)}

  @property
  def has_documents(self) -> bool:
    """Whether a source holds documents, each between two separators."""
    return any(part.source in FORMATS for part in self.parts.values())

  @property
  def has_text(self) -> bool:
    """Whether ids are a tokenizer's: those of recall tasks may be symbols without a text."""
    tasks = (recall.TASKS[part.source] for part in self.parts.values() if part.source in TASKS)
    return self.has_documents or any(task.reads_text for task in tasks)

  @property
  def segments(self) -> bool:
    """Whether batches hold segment_ids."""
    return self.documents if self.packing.method == "windows" else True

  @property
  def virtual_shards(self) -> int:
    """Streams that rows are drawn from in turn: row i of the run comes from stream i modulo this."""
    return self.shards or self.batch_size

  @property
  def order(self) -> dict[str, object]:
    """What decides, besides the files, which row comes next and which documents are held out: {field: value}.

    A place in the rows of one order means nothing in those of another.
    """
    packed = self.packing.method != "windows"
    found: dict[str, object] = {"data.packing.method": self.packing.method}
    if packed or self.has_documents:
      found["data.length"] = self.length
    if packed:
      found |= {f"data.packing.{field}": getattr(self.packing, field) for field in ("align", "window")}
      found["data.shards"] = self.virtual_shards
    if self.has_documents:
      found |= {f"data.{field}": getattr(self, field) for field in ("seed", "validation_fraction")}
    found["data.sources"] = [name for name, part in self.parts.items() if part.trains]
    for name, part in self.parts.items():
      prefix = f"data.sources.{name}" if self.source == "mixture" else "data"
      found[f"{prefix}.source"] = part.source
      if part.source in FORMATS:
        found[f"{prefix}.split"] = part.split
      if part.source in ("jsonl", "parquet"):
        found[f"{prefix}.field"] = part.field
    return found

  def problems(self, prefix: str = "data") -> list[str]:
    """Every setting that cannot work, one line each, naming the field and its valid values."""
    found = []

    def require(condition: bool, field: str, valid: str) -> None:
      if not condition:
        found.append(f"{prefix}.{field} must be {valid}, got {getattr(self, field)!r}")

    require(self.source in (*SOURCES, "mixture"), "source", f"one of {', '.join(SOURCES)}, mixture")
    if self.source == "mixture":
      require(bool(self.sources), "sources", "one or more named sources when source is mixture")
    elif self.sources:
      found.append(f"{prefix}.sources is read only when {prefix}.source is mixture, got {prefix}.source={self.source}")
    named = {f"{prefix}.sources.{name}": part for name, part in self.sources.items()}
    for name, part in named.items():
      if part.source not in SOURCES:
        found.append(f"{name}.source must be one of {', '.join(SOURCES)}, got {part.source!r}")
      if part.split not in SPLITS:
        found.append(f"{name}.split must be one of {', '.join(SPLITS)}, got {part.split!r}")
      if not part.weight >= 0:
        found.append(f"{name}.weight must be at least 0, got {part.weight!r}")
    for name, part in (named or {prefix: self}).items():
      found += part.source_problems(name, self.length)
      if self.packing.method == "windows" and part.source in FORMATS[2:]:
        found.append(
          f"{prefix}.packing.method must be concat or best_fit for {name}.source={part.source}, got 'windows'"
        )
    if self.packing.method == "windows":
      if self.source == "mixture":
        found.append(f"{prefix}.packing.method must be concat or best_fit for a mixture, got 'windows'")
      if self.tokenizer != "bytes":
        found.append(f"{prefix}.packing.method must be concat or best_fit with {prefix}.tokenizer={self.tokenizer}")
    found += (packing := self.packing.problems(f"{prefix}.packing"))
    if not packing and self.length % self.packing.align:
      found.append(
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
    return found
