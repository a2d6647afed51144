"""What a function's matrix products and transcendentals cost, counted in its jaxpr."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core

_TRANSCENDENTAL = frozenset(
  [
    "exp",
    "exp2",
    "expm1",
    "log",
    "log1p",
    "tanh",
    "logistic",
    "sin",
    "cos",
    "rsqrt",
    "sqrt",
    "erf",
    "pow",
  ]  # the primitives' names
)


class Work(NamedTuple):
  """flops: of matrix products, two per multiply-add; transcendentals: how many are taken."""

  flops: int
  transcendentals: int


def work(function: Callable, *args: Any) -> Work:
  """The work of function(*args), args being arrays or `jax.ShapeDtypeStruct`s; what its result does not need is free.

  (`pl.estimate_cost` fails on negative powers, which the gradients of quotients have.)
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return _work(jaxpr, {v for v in jaxpr.outvars if isinstance(v, core.Var)})


def _work(jaxpr: core.Jaxpr, needed: set[core.Var]) -> Work:
  flops = transcendentals = 0
  for eqn in reversed(jaxpr.eqns):
    if needed.isdisjoint(eqn.outvars):
      continue
    needed |= {v for v in eqn.invars if isinstance(v, core.Var)}
    size = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      flops += 2 * size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    elif eqn.primitive.name in _TRANSCENDENTAL:
      transcendentals += size
    for inner in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda p: isinstance(p, core.Jaxpr | core.ClosedJaxpr)
    ):
      if isinstance(inner, core.ClosedJaxpr):
        inner = inner.jaxpr
      if isinstance(inner, core.Jaxpr):
        # What a scan carries is needed by its next trip.
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        live = zip(inner.outvars, eqn.outvars, strict=False)
        live = {v for v, outer in live if (outer in needed or times > 1) and isinstance(v, core.Var)}
        more = _work(inner, live)
        flops, transcendentals = flops + times * more.flops, transcendentals + times * more.transcendentals
  return Work(flops, transcendentals)
