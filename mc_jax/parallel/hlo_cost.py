"""What a compiled program does in all: FLOPs, HBM traffic and collectives, with every loop's body times its trips.

XLA's own `cost_analysis()` counts a loop's body once, whatever its trip count, and an array in VMEM as one in HBM. This
one reads the optimised HLO, `compiled.as_text()` of XLA:TPU or XLA:CPU:

* A loop's trips are XLA's `known_trip_count`, or found by running the loop's integer scalars (XLA:TPU prints no count).
* A fusion is one operation: it reads its operands and writes its results, and nothing in between. What it reads only
  through a slice or a gather is charged the slice; what it updates in place, the update.
* An array has the size that its layout gives it, padded to whole tiles: f32[4096, 1] can be f32[4096, 128] on a TPU.
* A Pallas kernel is worth what its `pl.CostEstimate` says.

It is arithmetic on a program's text, not a measurement: it knows nothing of caches, overlap or contention.
"""

import collections
import dataclasses
import math
import operator
import re
from typing import Any, NamedTuple

import jax
import numpy as np


class Kernel(NamedTuple):
  """A Pallas kernel, all its calls together: how many, and the FLOPs and bytes of their `pl.CostEstimate`s."""

  calls: float
  flops: float
  bytes: float


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one execution costs each device.

  Attributes:
    flops: of matrix products and convolutions, two a multiply-add, and of kernels. Elementwise work is not in it.
    hbm_bytes: read from and written to the device's main memory, kernels included, collectives not.
    collective_bytes: {kind ("all-gather", ...): bytes}, the larger of what a device puts in and gets out, whatever the
      algorithm sends on the way; "kernel" is what kernels send themselves.
    kernels: {name: Kernel}, part of flops and hbm_bytes.
    unknown_loops: loops whose trips are not known, as "instruction (where it comes from)".
    unestimated_kernels: kernels without a `pl.CostEstimate`, taken for their operands' and results' bytes and no FLOPs.
  """

  flops: float
  hbm_bytes: float
  collective_bytes: dict[str, float]
  kernels: dict[str, Kernel]
  unknown_loops: tuple[str, ...]
  unestimated_kernels: tuple[str, ...]


def cost(compiled: jax.stages.Compiled, unknown_trips: float = 1) -> Cost:
  """The cost of one execution of a compiled function, of a conditional the costlier branch.

  Args:
    compiled: of `jax.jit(f).lower(...).compile()`, for TPU or CPU.
    unknown_trips: how often the loops in `unknown_loops` are taken to run, for example the mean of a traced bound.
  """
  total = _Program(compiled.as_text(), unknown_trips).cost()

  def named(kind):
    return {key[1]: value for key, value in total.items() if key[0] == kind}

  calls, flops, size = (named(kind) for kind in ("kernel calls", "kernel flops", "kernel bytes"))
  return Cost(
    flops=total["flops",],
    hbm_bytes=total["hbm",],
    collective_bytes=named("collective"),
    kernels={name: Kernel(calls[name], flops.get(name, 0), size.get(name, 0)) for name in calls},
    unknown_loops=tuple(named("unknown loop")),
    unestimated_kernels=tuple(named("unestimated kernel")),
  )


class _Array(NamedTuple):
  """An array's type: bits of an element, dimensions, and the layout as HLO prints it."""

  bits: int
  dims: tuple[int, ...]
  layout: str

  @property
  def in_hbm(self) -> bool:
    """Memory space 0, the default; 1 is a TPU's VMEM, others are scalar memory, semaphores, the host."""
    return "S(" not in self.layout

  @property
  def bytes(self) -> float:
    order, _, rest = self.layout.partition(":")
    dims = [self.dims[int(i)] for i in reversed(order.split(","))] if order else list(self.dims)
    if tile := re.match(r"T\(([\d,]+)\)", rest):
      tile = [int(size) for size in tile[1].split(",")]
      dims = [1] * (len(tile) - len(dims)) + dims
      dims[-len(tile) :] = [-(-dim // size) * size for dim, size in zip(dims[-len(tile) :], tile, strict=True)]
    return math.prod(dims) * self.bits / 8


class _Instruction(NamedTuple):
  name: str
  arrays: tuple[_Array, ...]  # the leaves of its type
  opcode: str
  operands: tuple[str, ...]
  argument: str  # the text between the parentheses
  attributes: str

  def attribute(self, name: str, pattern: str = r"%?([\w.\-]+)") -> str | None:
    found = re.search(rf"\b{name}={pattern}", self.attributes)
    return found and found[1]

  def called(self) -> list[str]:
    """The computations it runs: a fusion's, a call's, the branches of a conditional."""
    names = re.findall(
      r"\b(?:calls|to_apply|branch_computations|\w+_computation)=(\{[^}]*\}|%[\w.\-]+)", self.attributes
    )
    return re.findall(r"%([\w.\-]+)", " ".join(names))


class _Computation(NamedTuple):
  instructions: dict[str, _Instruction]
  root: str
  parameters: dict[int, str]
  users: dict[str, list[_Instruction]]


# What moves no data, or what its other half, -start, is charged for.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}
_COLLECTIVES = r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-\w+)(-start)?$"
_SLICES = {"dynamic-slice", "slice", "gather"}
_SAME_ELEMENTS = {"bitcast", "reshape", "copy", "convert", "transpose"}
_MAX_TRIPS = 1 << 16  # of a loop that is counted by running its scalars

_ARITHMETIC = {
  "add": operator.add,
  "subtract": operator.sub,
  "multiply": operator.mul,
  "minimum": min,
  "maximum": max,
  "and": operator.and_,
  "or": operator.or_,
}
_COMPARE = {name.upper(): getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}


class _Program:
  """The computations of an HLO module, and what they cost.

  Costs are counters {(kind, *name): amount}: `+` adds them up, `|` is the larger of each.
  """

  def __init__(self, text: str, unknown_trips: float):
    self.unknown_trips = unknown_trips
    self.computations, self.entry = _parse(text)

  def cost(self) -> collections.Counter:
    return self._computation(self.entry, [])

  def _computation(self, name: str, values: list) -> collections.Counter:
    """values: what is known of the parameters, see _evaluate."""
    total = collections.Counter()
    for instruction in self.computations[name].instructions.values():
      total.update(self._instruction(name, instruction, values))
    return total

  def _instruction(self, where: str, op: _Instruction, values: list) -> collections.Counter:
    computation = self.computations[where]
    operands = [computation.instructions[name] for name in dict.fromkeys(op.operands)]
    if op.opcode in _FREE or op.opcode.endswith(("-done", "-update")) or '"AllocateBuffer"' in op.attributes:
      return collections.Counter()
    if op.opcode == "while":
      return self._loop(where, op, values)
    if op.opcode == "conditional":
      branches = [self._computation(name, []) for name in op.called()]
      return collections.Counter({key: max(b[key] for b in branches) for key in set().union(*branches)})
    if op.opcode in ("call", "async-start"):
      return sum((self._computation(name, []) for name in op.called()), collections.Counter())
    if kind := re.match(_COLLECTIVES, op.opcode):
      put, got = (sum(a.bytes for source in ops for a in source.arrays) for ops in (operands, [op]))
      return collections.Counter({("collective", kind[1]): max(put, got - put if kind[2] else got)})
    if op.opcode == "custom-call" and '"tpu_custom_call"' in op.attributes:
      return self._kernel(op, operands)
    if op.opcode == "fusion":
      inner = self._computation(op.called()[0], [])
      inner["hbm",] = self._fusion_bytes(self.computations[op.called()[0]], op, operands)
      return inner
    total = collections.Counter({("hbm",): self._bytes(computation, op, operands)})
    if op.opcode in ("dot", "convolution"):
      total["flops",] = _product_flops(op, *(computation.instructions[name].arrays[0] for name in op.operands[:2]))
    return total

  def _bytes(self, computation: _Computation, op: _Instruction, operands: list[_Instruction]) -> float:
    """HBM bytes of an operation that stands alone."""
    # An asynchronous operation's type is (result, operand, ...) for copies and ((operands), result, ...) for slices.
    result = op.arrays
    if op.opcode.endswith("-start"):
      result = op.arrays[:1] if op.opcode == "copy-start" else op.arrays[len(op.operands) : len(op.operands) + 1]
    sliced = op.opcode.removesuffix("-start") in _SLICES
    if op.opcode in ("dynamic-update-slice", "scatter"):  # in place: what is new is read and written
      target, update = operands[0].arrays[0], computation.instructions[op.operands[-1 if op.opcode == "scatter" else 1]]
      return update.arrays[0].bytes * (target.in_hbm + update.arrays[0].in_hbm)
    read = 0.0
    for i, source in enumerate(operands):
      arrays = [a for a in source.arrays if a.in_hbm]
      read += sum(a.bytes for a in (result if sliced and i == 0 and arrays else arrays))
    return read + sum(a.bytes for a in result if a.in_hbm)

  def _fusion_bytes(self, fused: _Computation, op: _Instruction, operands: list[_Instruction]) -> float:
    """HBM bytes of a fusion: its operands, as far as they are read, and its results, as far as they are written."""
    updates = _updates(fused)
    in_place = {id(update) for update in updates if update}
    total = 0.0
    for i, name in enumerate(op.operands):
      source = next(x for x in operands if x.name == name)
      if len(source.arrays) == 1 and source.arrays[0].in_hbm and name not in op.operands[:i]:
        total += self._read(fused, fused.parameters[i], source.arrays[0], in_place)
    for array, update in zip(op.arrays, updates, strict=True):
      if array.in_hbm:
        written = fused.instructions[update.operands[1]].arrays[0] if update else array
        total += written._replace(bits=array.bits).bytes
    return total

  def _read(self, fused: _Computation, name: str, array: _Array, in_place: set[int]) -> float:
    """Bytes of an operand that a fused computation reads of its value `name`; at most all of it."""
    total = 0.0
    for user in fused.users.get(name, ()):
      if user.opcode in _SLICES and user.operands[0] == name:
        total += user.arrays[0]._replace(bits=array.bits).bytes
      elif user.opcode == "fusion":
        inner = self.computations[user.called()[0]]
        for i, operand in enumerate(user.operands):
          total += self._read(inner, inner.parameters[i], array, in_place) if operand == name else 0.0
      elif id(user) in in_place and user.operands[0] == name:
        continue
      elif user.opcode in _SAME_ELEMENTS and user.name != fused.root:
        total += self._read(fused, user.name, array, in_place)
      else:
        return array.bytes
    return min(total, array.bytes) if fused.users.get(name) else array.bytes

  def _kernel(self, op: _Instruction, operands: list[_Instruction]) -> collections.Counter:
    # Its own name is what transformations are wrapped around: ".../transpose(jvp(NAME))/pallas_call".
    named = re.search(r"([\w.\-]+)\)*/pallas_call", op.attribute("op_name", r'"([^"]*)') or "")
    name = named[1] if named else re.sub(r"(\.\d+|\.clone)+$", "", op.name)
    total = collections.Counter({("kernel calls", name): 1})
    if found := re.search(r'"cost_estimate":\{([^}]*)\}', op.attributes):
      estimate = collections.Counter({key: int(n) for key, n in re.findall(r'"(\w+)":"?(-?\d+)', found[1])})
      flops, size = estimate["flops"], estimate["bytes_accessed"]
      total["collective", "kernel"] = estimate["remote_bytes_transferred"]
    else:
      total["unestimated kernel", name] = 1
      flops, size = 0, sum(a.bytes for source in (*operands, op) for a in source.arrays if a.in_hbm)
    total.update({("flops",): flops, ("hbm",): size, ("kernel flops", name): flops, ("kernel bytes", name): size})
    return +total

  def _loop(self, where: str, op: _Instruction, values: list) -> collections.Counter:
    condition, body = op.attribute("condition"), op.attribute("body")
    state = self._evaluate(where, op.operands[0], values, {})
    total = collections.Counter()
    if known := re.search(r'"known_trip_count":\{"n":"?(\d+)', op.attributes):
      trips = int(known[1])
    elif (trips := self._trips(condition, body, state)) is None:
      trips = self.unknown_trips
      source = op.attribute("op_name", r'"([^"]*)')
      total["unknown loop", f"{op.name} ({source})"] = 1
    each = self._computation(body, [self._invariant(body, state)]) + self._computation(condition, [])
    total.update({key: value * (1 if key[0] == "unknown loop" else trips) for key, value in each.items()})
    return total

  def _trips(self, condition: str, body: str, state: Any) -> int | None:
    """Runs a loop on what is known of its state; None if that does not tell when it ends."""
    for trips in range(_MAX_TRIPS):
      goes_on = self._evaluate(condition, self.computations[condition].root, [state], {})
      if not goes_on:
        return None if goes_on is None else trips
      state = self._evaluate(body, self.computations[body].root, [state], {})
    return None

  def _invariant(self, body: str, state: Any) -> Any:
    """Of a loop's first state, the entries that its body hands on as they are."""
    computation = self.computations[body]
    root = computation.instructions[computation.root]
    if not isinstance(state, list) or root.opcode != "tuple":
      return None

    def handed_on(i, name):
      op = computation.instructions[name]
      while op.opcode == "copy":
        op = computation.instructions[op.operands[0]]
      return op.opcode == "get-tuple-element" and op.attribute("index") == str(i)

    return [x if handed_on(i, name) else None for i, (x, name) in enumerate(zip(state, root.operands, strict=True))]

  def _evaluate(self, where: str, name: str, values: list, memo: dict) -> Any:
    """The value of an integer scalar, or a list of them for a tuple; None for what is not known.

    values: those of the computation's parameters.
    """
    if name in memo:
      return memo[name]
    op = self.computations[where].instructions[name]
    value = None
    if op.opcode == "constant":
      value = {"true": True, "false": False}.get(op.argument)
      value = int(op.argument) if re.fullmatch(r"-?\d+", op.argument) else value
    elif op.opcode == "parameter":
      value = values[int(op.argument)] if int(op.argument) < len(values) else None
    elif op.opcode == "get-tuple-element":
      whole = self._evaluate(where, op.operands[0], values, memo)
      value = whole[int(op.attribute("index"))] if isinstance(whole, list) else None
    elif op.opcode == "tuple" or all(a.dims == () for a in op.arrays):
      inputs = [self._evaluate(where, operand, values, memo) for operand in op.operands]
      if op.opcode == "tuple":
        value = inputs
      elif op.opcode in ("fusion", "call"):
        inner = op.called()[0]
        value = self._evaluate(inner, self.computations[inner].root, inputs, {})
      elif op.opcode in _SAME_ELEMENTS:
        value = inputs[0]
      elif op.opcode in (*_ARITHMETIC, "compare") and None not in inputs:
        function = _ARITHMETIC.get(op.opcode) or _COMPARE[op.attribute("direction")]
        value = function(*inputs)
    memo[name] = value
    return value


def _updates(fused: _Computation) -> list[_Instruction | None]:
  """For every result of a fusion, the dynamic-update-slice that makes it in place."""
  root = fused.instructions[fused.root]
  if root.opcode == "tuple":
    return [_updated(fused, fused.instructions[name]) for name in root.operands]
  return [_updated(fused, root)] * len(root.arrays)  # more than one: a reduction to a pair, such as argmax


def _updated(fused: _Computation, result: _Instruction) -> _Instruction | None:
  """The dynamic-update-slice of a parameter that a fusion's result is, made in place; None if it is none."""

  def behind(op, opcode):
    while op.opcode == "bitcast":
      op = fused.instructions[op.operands[0]]
    return op if op.opcode == opcode else None

  update = behind(result, "dynamic-update-slice")
  return update if update and behind(fused.instructions[update.operands[0]], "parameter") else None


def _product_flops(op: _Instruction, a: _Array, b: _Array) -> int:
  """FLOPs of a dot or a convolution, two a multiply-add that does not fall into padding."""
  result = op.arrays[0].dims
  if op.opcode == "dot":
    contracted = op.attribute("lhs_contracting_dims", r"\{([\d,]*)\}")
    return 2 * math.prod(result) * math.prod(a.dims[int(i)] for i in contracted.split(",") if i)
  # On a TPU, batched products are convolutions too, along strided and dilated windows of which one position counts.
  inputs, kernel, outputs = re.split(r"_|->", op.attribute("dim_labels", r"([\w>\-]+)"))
  total = 2 * result[outputs.index("b")] * result[outputs.index("f")] * b.dims[kernel.index("i")]
  window = {
    key: value.split("x")
    for key, value in re.findall(r"(\w+)=([\dx_\-]+)", op.attribute("window", r"\{([^}]*)\}") or "")
  }
  for i in range(len(inputs) - 2):
    stride, spread, apart = (
      int(window[key][i]) if key in window else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
    )
    before = int(window["pad"][i].split("_")[0]) if "pad" in window else 0
    places = np.arange(result[outputs.index(str(i))])[:, None] * stride - before
    places = places + np.arange(b.dims[kernel.index(str(i))]) * apart
    inside = (places >= 0) & (places <= (a.dims[inputs.index(str(i))] - 1) * spread) & (places % spread == 0)
    total *= int(inside.sum())
  return total


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  """The computations of an HLO module's text, by name, and the name of the one that it starts with."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
      current = _Computation({}, "", {}, collections.defaultdict(list))
      name, entry = header[2], header[2] if header[1] else entry
    elif line == "}":
      computations[name] = current
      current = None
    elif current is not None and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
      op = _instruction(found[2], line[found.end() :])
      current.instructions[op.name] = op
      current = current._replace(root=op.name) if found[1] else current
      for operand in dict.fromkeys(op.operands):
        current.users[operand].append(op)
      if op.opcode == "parameter":
        current.parameters[int(op.argument)] = op.name
  return computations, entry


def _instruction(name: str, text: str) -> _Instruction:
  """An instruction from its text after "name = ": type opcode(operands), attributes."""
  end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
  opening = text.index("(", end)
  closing = _closing(text, opening)
  argument = text[opening + 1 : closing]
  arrays = tuple(
    _Array(_bits(dtype), tuple(int(n) for n in dims.split(",") if n), layout)
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", text[:end])
  )
  operands = tuple(re.findall(r"%([\w.\-]+)", argument))
  return _Instruction(name, arrays, text[end:opening].strip(), operands, argument, text[closing + 1 :])


def _bits(dtype: str) -> int:
  """Bits of an element: 16 for bf16, 8 for f8e4m3fn and pred, 0 for tokens."""
  number = re.search(r"\d+", dtype)
  return int(number[0]) if number else 8 * (dtype == "pred")


def _closing(text: str, opening: int) -> int:
  """Where the parenthesis that opens at `opening` closes."""
  depth = 0
  for found in re.compile(r"[()]").finditer(text, opening):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.start()
  raise ValueError(f"no closing parenthesis in {text[opening : opening + 80]!r}")
