"""Weighted sums of a table's rows, as Pallas TPU kernels."""

import jax


def unsupported(values: jax.Array, rows: jax.Array) -> str | None:
  """What the kernels cannot take, for a message; None if they take it all."""
  return "not written yet"


weighted_sum = gradients = None
