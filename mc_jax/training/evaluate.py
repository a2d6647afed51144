"""Validation loss, in bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from mc_jax.training.step import Batch


def bits(eval_step: Callable, params: dict, batches: Iterable[Batch]) -> float:
  """Sum of -log2 p(target) over the targets that count.

  Args:
    eval_step: (params, batch) -> (sum of the loss in nats, sum of the weights).
    params: of the model.
    batches: placed on the mesh.
  """
  sums = [eval_step(params, batch) for batch in batches]
  return sum(float(loss) for loss, _ in sums) / math.log(2)
