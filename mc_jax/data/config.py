"""What a run reads, and how it is cut into batches."""

from __future__ import annotations

import dataclasses

SOURCES = ("stdlib", "text")


class ConfigError(ValueError):
  """A setting that cannot work: the message names the field and the values that would."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The corpus, its split into training and validation, and the shape of a batch."""

  source: str = "stdlib"  # "stdlib": this Python's standard library; "text": the files of `paths`
  paths: str = ""  # source="text": files, folders or globs (** included), separated by commas
  length: int = 512  # tokens in a row
  batch_size: int = 16  # rows in an optimiser step, all microbatches together
  validation_fraction: float = 0.05  # of the files, chosen by a hash of their names
  validation_tokens: int = 131_072  # at most this many validation tokens are scored; 0: all
  documents: bool = False  # mark files with segment_ids, so that nothing carries over between them
  seed: int = 0  # of the split and of the order of training windows

  def problems(self, prefix: str = "data") -> list[str]:
    """Every setting that cannot work, one line each, naming the field and its valid values."""
    found = []

    def require(condition: bool, field: str, valid: str) -> None:
      if not condition:
        found.append(f"{prefix}.{field} must be {valid}, got {getattr(self, field)!r}")

    require(self.source in SOURCES, "source", f"one of {', '.join(SOURCES)}")
    if self.source == "text":
      require(
        any(path.strip() for path in self.paths.split(",")),
        "paths",
        f"files, folders or globs separated by commas, such as 'books/*.txt', when {prefix}.source is text",
      )
    elif self.paths:
      found.append(
        f"{prefix}.paths is read only by {prefix}.source=text, got {self.paths!r} with {prefix}.source={self.source}"
      )
    require(self.length >= 1, "length", "at least 1")
    require(self.batch_size >= 1, "batch_size", "at least 1")
    require(0 < self.validation_fraction < 1, "validation_fraction", "between 0 and 1, both excluded")
    require(self.validation_tokens >= 0, "validation_tokens", "positive, or 0 for all")
    require(0 <= self.seed < 2**32, "seed", "between 0 and 2**32 - 1")
    return found
