"""Cuts a stream of tokens into rows of one length, groups rows into batches, and places batches on a mesh.

A batch is a dict of [batch, length] arrays: `tokens` int32; `targets` int32, the token after each; `weights` float32,
1 where the target is scored and 0 elsewhere; and, if documents are separated, `segment_ids` int32, 1, 2, ... from left
to right.
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

# Practically endless; the length that Grain reports for an endless dataset overflows in batches of one row.
_EPOCHS = 1_000_000


def training(stream: np.ndarray, config: DataConfig) -> grain.MapDataset:
  """Endless shuffled rows of `stream` uint8 [tokens]; row i is a function of the seed and i alone.

  The stream is divided into stretches of `length` tokens. In every epoch, one row starts at a random position of each
  stretch, in a new order of the stretches.

  Raises:
    ConfigError: The stream is shorter than one row.
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
  """The arrays of the whole job for a batch that every process has.

  Args:
    batch: The batch.
    shapes: The shapes, dtypes and shardings of the arrays, see `shapes`.
  """
  return {
    name: jax.make_array_from_callback(spec.shape, spec.sharding, batch[name].__getitem__)
    for name, spec in shapes.items()
  }


def validation(stream: np.ndarray, config: DataConfig) -> list[Batch]:
  """The validation batches: windows of `stream` uint8 [tokens] that do not overlap, the same at every evaluation.

  At most `validation_tokens` are used, spread evenly over the stream, because its first files may not be
  representative. The last batch is padded with rows of weight 0.
  """
  length = config.length
  starts = np.arange(0, len(stream) - 1, length)
  if config.validation_tokens:
    count = min(len(starts), max(1, config.validation_tokens // length))
    starts = starts[np.arange(count) * len(starts) // count]
  rows = [_row(stream[s : s + length + 1], length, config.documents) for s in starts]
  return batches(rows, config.batch_size)


def batches(rows: list[Batch], batch_size: int) -> list[Batch]:
  """Groups rows into batches; the last batch is padded with rows of weight 0."""
  stacked = []
  for first in range(0, len(rows), batch_size):
    group = rows[first : first + batch_size]
    empty = {name: np.zeros_like(array) for name, array in group[0].items()}
    group = group + [empty] * (batch_size - len(group))
    stacked.append({name: np.stack([row[name] for row in group]) for name in empty})
  return stacked


def shapes(config: DataConfig, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes, dtypes and shardings of a batch on a mesh."""
  dtypes = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
  if config.segments:
    dtypes["segment_ids"] = np.int32
  shape = (config.batch_size, config.length)
  sharding = axes.sharding(mesh, axes.TOKENS)
  return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}


def _row(piece: np.ndarray, length: int, documents: bool) -> Batch:
  """The row of up to length + 1 tokens; missing positions have weight 0."""
  size = len(piece) - 1
  row = {
    "tokens": np.zeros(length, np.int32),
    "targets": np.zeros(length, np.int32),
    "weights": np.zeros(length, np.float32),
  }
  row["tokens"][:size] = piece[:-1]
  row["targets"][:size] = piece[1:]
  row["weights"][:size] = 1.0
  if documents:
    ids = np.zeros(length, np.int32)
    ids[:size] = 1 + np.cumsum(piece[:-1] == tokenizers.SEPARATOR)
    row["segment_ids"] = ids
  return row
