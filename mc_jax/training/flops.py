"""Counting the multiply-adds of a function, for the utilisation of the hardware."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax


def count(function: Callable, *args) -> int:
  """FLOPs of the matrix products in function(*args), 2 per multiply-add.

  Traced, not run: args may be abstract. Loops count as often as they turn (XLA's own analysis
  counts their body once); of a `cond` the dearest branch counts, of a `while` one turn. Reads of all
  cached memories (residual, grm, soup) are such a `while`, so their utilisation comes out low.
  """
  return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr) -> int:
  return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * inner * math.prod(equation.outvars[0].aval.shape)
  if name.startswith("ragged_dot"):
    rows, inner = equation.invars[0].aval.shape[-2:]
    return 2 * rows * inner * equation.invars[1].aval.shape[-1]
  inner_counts = [
    _count(getattr(value, "jaxpr", value))
    for param in params.values()
    for value in (param if isinstance(param, tuple | list) else (param,))
    if hasattr(getattr(value, "jaxpr", value), "eqns")
  ]
  if name == "cond":
    return max(inner_counts)
  return params.get("length", 1) * sum(inner_counts) if name == "scan" else sum(inner_counts)
