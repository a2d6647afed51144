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
  """The work of function(*args); operations that its result does not need are free.

  Traced, not run. A scan counts as often as it turns (XLA's own analysis counts its body once), a `cond` as its dearest
  branch, a `while` as one turn: reads of all cached memories without a kernel are such a `while`, and come out low. A
  kernel counts what its `pl.CostEstimate` says, or else its body in every step of its grid. (`pl.estimate_cost` fails
  on negative powers, which the gradients of quotients have.)

  Args:
    function: A function of arrays.
    args: Arrays or `jax.ShapeDtypeStruct`s, or pytrees of them.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return _work(jaxpr, {v for v in jaxpr.outvars if isinstance(v, core.Var)})


def _work(jaxpr: core.Jaxpr, needed: set[core.Var]) -> Work:
  flops = transcendentals = 0
  for eqn in reversed(jaxpr.eqns):
    if needed.isdisjoint(eqn.outvars) and not eqn.effects:
      continue
    needed |= {v for v in eqn.invars if isinstance(v, core.Var)}
    name, params, shape = eqn.primitive.name, eqn.params, eqn.outvars[0].aval.shape if eqn.outvars else ()
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      flops += 2 * math.prod(shape) * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    elif name.startswith("ragged_dot"):
      flops += 2 * math.prod(eqn.invars[0].aval.shape[-2:]) * eqn.invars[1].aval.shape[-1]
    elif name in _TRANSCENDENTAL:
      transcendentals += math.prod(shape)
    if (estimate := params.get("cost_estimate")) is not None:
      inner, times = [Work(estimate.flops, estimate.transcendentals)], 1
    else:
      times = _turns(name, params)
      inner = [_work(jaxpr, _needed(jaxpr, eqn, needed, name == "while" or times > 1)) for jaxpr in _inner(params)]
    if name == "cond":
      inner = [max(inner)]
    flops += times * sum(part.flops for part in inner)
    transcendentals += times * sum(part.transcendentals for part in inner)
  return Work(flops, transcendentals)


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
  """The programs inside an operation."""
  found = jax.tree.leaves(list(params.values()), is_leaf=lambda p: isinstance(p, core.Jaxpr | core.ClosedJaxpr))
  found = [program.jaxpr if isinstance(program, core.ClosedJaxpr) else program for program in found]
  return [program for program in found if isinstance(program, core.Jaxpr)]


def _turns(name: str, params: dict[str, Any]) -> int:
  """How often an operation runs the programs inside it."""
  if name == "scan":
    return params["length"]
  return math.prod(params["grid_mapping"].grid) if name == "pallas_call" else 1


def _needed(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, needed: set[core.Var], loops: bool) -> set[core.Var]:
  """The results of an inner program that are needed; what a loop carries is needed by its next turn."""
  results = zip(jaxpr.outvars, eqn.outvars, strict=False)
  return {v for v, outer in results if (outer in needed or loops) and isinstance(v, core.Var)}
