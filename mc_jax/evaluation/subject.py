"""The arguments and results of tasks."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import jax
from flax import nnx

from mc_jax.data import DataConfig, datasets, identity
from mc_jax.data.identity import Identity
from mc_jax.data.windows import Batch
from mc_jax.errors import ConfigError
from mc_jax.evaluation import scoring
from mc_jax.evaluation.scoring import Scored
from mc_jax.parallel import axes


@dataclasses.dataclass(frozen=True)
class Subject:
  """The model and data under evaluation.

  Attributes:
    graph: The model's graph: `nnx.merge(graph, params)` is the model.
    params: The model's parameters.
    vocab_size: The model's vocabulary size.
    data: The run's data configuration, from which tasks take their settings and the size of batches.
    mesh: The parameters' mesh.
    trained: The identity of the data that the model was trained on; None: unknown.
  """

  graph: nnx.GraphDef
  params: dict
  vocab_size: int
  data: DataConfig
  mesh: jax.sharding.Mesh
  trained: Identity | None = None
  _scorers: dict = dataclasses.field(default_factory=dict, init=False, repr=False)  # compiled, by shape

  def rows_of(self, length: int) -> DataConfig:
    """`data` with rows of another length and about the same number of tokens in a batch."""
    together = math.prod(self.mesh.shape[axis] for axis in axes.RULES["batch"])  # devices have equally many rows
    rows = max(1, self.data.batch_size * self.data.length // length // together) * together
    return dataclasses.replace(self.data, length=length, batch_size=rows)

  def load(self, data: DataConfig, what: str) -> datasets.Dataset:
    """The dataset of a task, which errors call `what`.

    Raises:
      ConfigError: `data` has problems, or ids that the model does not have or that come from another tokenizer.
    """
    if problems := data.problems():
      raise ConfigError("\n".join(f"{what}: {problem}" for problem in problems))
    dataset = datasets.load(data)
    identity.require_tokenizer(self.trained, dataset.identity.tokenizer, data.tokenizer)
    if dataset.vocab_size > self.vocab_size:
      raise ConfigError(
        f"{what} needs a model.vocab_size of at least {dataset.vocab_size}, the number of its ids; the run has "
        f"{self.vocab_size}"
      )
    return dataset

  def score(self, data: DataConfig, batches: Sequence[Batch]) -> list[Scored]:
    """Scores batches of the configuration `data`."""
    shape = data.batch_size, data.length, data.segments
    if shape not in self._scorers:
      self._scorers[shape] = scoring.scorer(self.graph, data, self.mesh)
    return self._scorers[shape](self.params, batches)


@dataclasses.dataclass(frozen=True)
class Options:
  """The options of tasks.

  Attributes:
    lengths: Lengths of rows in tokens; empty: the run's.
    pairs: mqar: Numbers of key-value pairs; empty: those of data.mqar.pairs.
    rows: Rows in each setting of a recall task.
    limit: lm-evaluation-harness: Number of documents in each task, or their share if below 1; None: all.
    num_fewshot: lm-evaluation-harness: Number of examples before each question; None: the task's default.
    include_path: lm-evaluation-harness: Folder with the user's tasks; None: there are none.
  """

  lengths: tuple[int, ...] = ()
  pairs: tuple[int, ...] = ()
  rows: int = 256
  limit: float | None = None
  num_fewshot: int | None = None
  include_path: str | None = None

  def check(self) -> Options:
    """Returns self, or raises ConfigError."""
    for name in ("lengths", "pairs"):
      if any(value < 1 for value in getattr(self, name)):
        raise ConfigError(f"--{name} must be numbers of at least 1, got {', '.join(map(str, getattr(self, name)))}")
      if len(set(getattr(self, name))) < len(getattr(self, name)):
        raise ConfigError(f"--{name} must be numbers that differ, got {', '.join(map(str, getattr(self, name)))}")
    if self.rows < 1:
      raise ConfigError(f"--rows must be at least 1, got {self.rows}")
    if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and self.limit == int(self.limit))):
      raise ConfigError(f"--limit must be a number of documents, or a share of them below 1, got {self.limit:g}")
    if self.num_fewshot is not None and self.num_fewshot < 0:
      raise ConfigError(f"--num_fewshot must be at least 0, got {self.num_fewshot}")
    if self.include_path is not None and not pathlib.Path(self.include_path).is_dir():
      raise ConfigError(f"--include_path must be a folder, got {self.include_path}")
    return self


@dataclasses.dataclass(frozen=True)
class Result:
  """The result of a task in one setting.

  Attributes:
    task: The task's name.
    settings: The setting, such as {"length": 512, "pairs": 8}.
    values: The measured values, such as {"accuracy": 0.9, "stderr": 0.01}.
    curve: Loss by position, {"from", "to", "tokens", "loss"} each; empty for tasks without.
    reads: Gates by the memory that holds the answer, {"memory", "tokens", "gamma"} each, see gates.reads; empty for
      tasks without.
    usage: The values' shares of weight, {"row", "share"} each, see usage.run; empty for tasks without.
  """

  task: str
  settings: dict[str, int | str]
  values: dict[str, float]
  curve: tuple[dict[str, float], ...] = ()
  reads: tuple[dict, ...] = ()
  usage: tuple[dict[str, float], ...] = ()
