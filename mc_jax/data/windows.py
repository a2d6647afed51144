"""A stream of tokens cut into rows of one length, rows into batches, and batches among a mesh's devices.

A batch is a dict of [batch, length] arrays: `tokens` int32; `targets` int32, the token after each;
`weights` float32, 1 where the target counts and 0 where it does not; and, where documents are kept
apart, `segment_ids` int32, 1, 2, ... from left to right.
"""

from __future__ import annotations

import grain
import jax
import numpy as np

from mc_jax.data import tokenizers
from mc_jax.data.config import DataConfig
from mc_jax.errors import ConfigError
from mc_jax.parallel import axes

Batch = dict[str, np.ndarray]

# As good as endless: the length that Grain gives an endless dataset overflows in batches of one row.
_EPOCHS = 1_000_000


def training(stream: np.ndarray, config: DataConfig) -> grain.MapDataset:
  """Endless shuffled rows of `stream` [tokens]: row i is a function of the seed and i alone.

  An epoch visits every stretch of `length` tokens once on average: one window starts at a random
  place in each, in an order of its own.

  Raises:
    ConfigError: the stream is shorter than one row.
  """
  length = config.length
  last_start = len(stream) - length - 1
  if last_start < 0:
    raise ConfigError(
      f"data.length={length} is longer than the training text of {len(stream)} bytes; "
      f"it must be at most {max(len(stream) - 1, 0)}"
    )

  def cut(window: int, rng: np.random.Generator) -> Batch:
    start = min(window * length + int(rng.integers(length)), last_start)
    return _row(stream[start : start + length + 1], length, config.documents)

  dataset = grain.MapDataset.range(-(-len(stream) // length))
  return dataset.seed(config.seed).shuffle().repeat(_EPOCHS).random_map(cut)


def place(batch: Batch, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """A batch that every process has, as arrays of the whole job."""
  return {
    name: jax.make_array_from_callback(spec.shape, spec.sharding, batch[name].__getitem__)
    for name, spec in shapes.items()
  }


def validation(stream: np.ndarray, config: DataConfig) -> list[Batch]:
  """The same batches at every evaluation: windows of `stream` that do not overlap.

  Up to `validation_tokens` they are spread evenly over the stream, for its first files are not
  like the rest. The last batch is filled up with rows of weight 0.
  """
  length = config.length
  starts = np.arange(0, len(stream) - 1, length)
  if config.validation_tokens:
    count = min(len(starts), max(1, config.validation_tokens // length))
    starts = starts[np.arange(count) * len(starts) // count]
  rows = [_row(stream[s : s + length + 1], length, config.documents) for s in starts]
  return batches(rows, config.batch_size)


def batches(rows: list[Batch], batch_size: int) -> list[Batch]:
  """Rows in batches; the last one is filled up with rows of weight 0."""
  found = []
  for first in range(0, len(rows), batch_size):
    group = rows[first : first + batch_size]
    empty = {name: np.zeros_like(array) for name, array in group[0].items()}
    group = group + [empty] * (batch_size - len(group))
    found.append({name: np.stack([row[name] for row in group]) for name in empty})
  return found


def shapes(config: DataConfig, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, dtypes and shardings of a batch on a mesh."""
  dtypes = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
  if config.segments:
    dtypes["segment_ids"] = np.int32
  shape = (config.batch_size, config.length)
  sharding = axes.sharding(mesh, axes.TOKENS)
  return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}


def _row(piece: np.ndarray, length: int, documents: bool) -> Batch:
  """One row of `length` from up to length + 1 tokens; what is missing has weight 0."""
  known = len(piece) - 1
  row = {
    "tokens": np.zeros(length, np.int32),
    "targets": np.zeros(length, np.int32),
    "weights": np.zeros(length, np.float32),
  }
  row["tokens"][:known] = piece[:-1]
  row["targets"][:known] = piece[1:]
  row["weights"][:known] = 1.0
  if documents:
    ids = np.zeros(length, np.int32)
    ids[:known] = 1 + np.cumsum(piece[:-1] == tokenizers.SEPARATOR)
    row["segment_ids"] = ids
  return row
