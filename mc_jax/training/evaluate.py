"""Validation loss, in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from mc_jax.training.step import Batch


def bits_per_byte(eval_step: Callable, params: dict, batches: Iterable[Batch]) -> float:
  """Mean of -log2 p(target) over the targets that count; a token is a byte.

  Args:
    eval_step: (params, batch) -> (sum of the loss in nats, sum of the weights).
    params: of the model.
    batches: those of data.windows.validation, placed.
  """
  sums = [eval_step(params, batch) for batch in batches]
  nats = sum(float(loss) for loss, _ in sums)
  return nats / math.log(2) / sum(float(weight) for _, weight in sums)
