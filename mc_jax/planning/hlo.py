"""Parses a compiled program's text: `compiled.as_text()`, the optimised HLO of XLA:TPU or XLA:CPU.

`Module` can also evaluate a program's integer scalars as far as they are known, to count the trips of a loop.
"""

import collections
import math
import operator
import re
from typing import Any, NamedTuple

import numpy as np

# Operations whose result has the same elements as their operand.
SAME_ELEMENTS = {"bitcast", "reshape", "copy", "convert", "transpose"}
_MAX_TRIPS = 1 << 16  # most trips of a loop that are counted by evaluating its scalars

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


class Array(NamedTuple):
  """The type of an array."""

  bits: int  # size of an element
  dims: tuple[int, ...]
  layout: str  # as HLO prints it, without the braces

  @property
  def in_hbm(self) -> bool:
    """Whether the array is in memory space 0; 1 is VMEM, others are scalar memory, semaphores and the host."""
    return "S(" not in self.layout

  @property
  def bytes(self) -> float:
    """Size in its layout, padded to whole tiles."""
    order, _, rest = self.layout.partition(":")
    dims = [self.dims[int(i)] for i in reversed(order.split(","))] if order else list(self.dims)
    if tile := re.match(r"T\(([\d,]+)\)", rest):
      tile = [int(size) for size in tile[1].split(",")]
      dims = [1] * (len(tile) - len(dims)) + dims
      dims[-len(tile) :] = [-(-dim // size) * size for dim, size in zip(dims[-len(tile) :], tile, strict=True)]
    return math.prod(dims) * self.bits / 8


class Instruction(NamedTuple):
  """A line of HLO: `name = type opcode(operands), attributes`."""

  name: str
  arrays: tuple[Array, ...]  # leaves of the result's type
  opcode: str
  operands: tuple[str, ...]  # names of instructions in the same computation
  argument: str  # text between the parentheses
  attributes: str

  def attribute(self, name: str, pattern: str = r"%?([\w.\-]+)") -> str | None:
    """The first group of `pattern` in the attribute "name=..."; None if there is no such attribute."""
    match = re.search(rf"\b{name}={pattern}", self.attributes)
    return match and match[1]

  def called(self) -> list[str]:
    """The names of the computations that it runs: those of a fusion or a call, or the branches of a conditional."""
    names = re.findall(
      r"\b(?:calls|to_apply|branch_computations|\w+_computation)=(\{[^}]*\}|%[\w.\-]+)", self.attributes
    )
    return re.findall(r"%([\w.\-]+)", " ".join(names))


class Computation(NamedTuple):
  """A named sequence of instructions, such as a fusion or the body of a loop."""

  instructions: dict[str, Instruction]  # by name, in order
  root: str  # name of the instruction whose value is the result
  parameters: dict[int, str]  # names of the parameters, by number
  users: dict[str, list[Instruction]]  # {name: instructions that have it as an operand}


class Module:
  """A program.

  Attributes:
    computations: The computations, by name.
    entry: The name of the computation that the program starts with.
  """

  def __init__(self, text: str):
    self.computations, self.entry = _parse(text)

  def trips(self, condition: str, body: str, state: Any) -> int | None:
    """The number of trips of a loop, by evaluating its scalars; None if they are not known well enough.

    Args:
      condition: The name of the loop's condition.
      body: The name of the loop's body.
      state: The known part of its initial state, a value of `evaluate`.
    """
    for trips in range(_MAX_TRIPS):
      continues = self.evaluate(condition, self.computations[condition].root, [state])
      if not continues:
        return None if continues is None else trips
      state = self.evaluate(body, self.computations[body].root, [state])
    return None

  def invariant(self, body: str, state: Any) -> Any:
    """The entries of a loop's initial state that its body leaves unchanged, and None in place of the others."""
    computation = self.computations[body]
    root = computation.instructions[computation.root]
    if not isinstance(state, list) or root.opcode != "tuple":
      return None

    def unchanged(i, name):
      op = computation.instructions[name]
      while op.opcode == "copy":
        op = computation.instructions[op.operands[0]]
      return op.opcode == "get-tuple-element" and op.attribute("index") == str(i)

    return [x if unchanged(i, name) else None for i, (x, name) in enumerate(zip(state, root.operands, strict=True))]

  def evaluate(self, where: str, name: str, values: list, memo: dict | None = None) -> Any:
    """The value of an instruction: an integer scalar, a list of values for a tuple, or None if it is not known.

    Args:
      where: The name of a computation.
      name: The name of an instruction in it.
      values: The values of the computation's parameters.
      memo: {name: value} of instructions that were evaluated before, which is updated.
    """
    memo = {} if memo is None else memo
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
      whole = self.evaluate(where, op.operands[0], values, memo)
      value = whole[int(op.attribute("index"))] if isinstance(whole, list) else None
    elif op.opcode == "tuple" or all(a.dims == () for a in op.arrays):
      inputs = [self.evaluate(where, operand, values, memo) for operand in op.operands]
      if op.opcode == "tuple":
        value = inputs
      elif op.opcode in ("fusion", "call"):
        inner = op.called()[0]
        value = self.evaluate(inner, self.computations[inner].root, inputs)
      elif op.opcode in SAME_ELEMENTS:
        value = inputs[0]
      elif op.opcode in (*_ARITHMETIC, "compare") and None not in inputs:
        function = _ARITHMETIC.get(op.opcode) or _COMPARE[op.attribute("direction")]
        value = function(*inputs)
    memo[name] = value
    return value


def group(op: Instruction) -> list[int]:
  """The devices of a collective's first group, as positions in the mesh's order; [] if the text lists none."""
  if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)", op.attributes):
    return [int(pairs[1]), int(pairs[2])]
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", op.attributes):
    return [int(i) for i in listed[1].split(",")]
  # iota: [groups, size]<=[shape]T(order) is 0, 1, 2, ... in this shape, transposed, then reshaped to groups.
  if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", op.attributes):
    groups, shape, order = ([int(i) for i in text.split(",")] if text else None for text in iota.groups())
    return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(groups)[0].tolist()
  # A mesh and the axes of a group; 'x':(2)4 is a part of axis x, the factor 4 that follows the factor 2.
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", op.attributes):
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
    places, index, stride = np.zeros(1, int), {}, 1
    for name in reversed(sizes):
      index[name], stride = stride, stride * sizes[name]
    for name, before, factor in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[2]):
      size = int(factor or sizes[name])
      step = index[name] * sizes[name] // (int(before or 1) * size)
      places = (places[:, None] + step * np.arange(size)).ravel()
    return places.tolist()
  return []


def instruction(name: str, text: str) -> Instruction:
  """Parses an instruction.

  Args:
    name: The instruction's name.
    text: The text after "name = ": type opcode(operands), attributes.
  """
  end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
  opening = text.index("(", end)
  closing = _closing(text, opening)
  argument = text[opening + 1 : closing]
  arrays = tuple(
    Array(_bits(dtype), tuple(int(n) for n in dims.split(",") if n), layout)
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", text[:end])
  )
  operands = tuple(re.findall(r"%([\w.\-]+)", argument))
  return Instruction(name, arrays, text[end:opening].strip(), operands, argument, text[closing + 1 :])


def _parse(text: str) -> tuple[dict[str, Computation], str]:
  """(the computations of an HLO module, by name; the name of its entry computation)."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
      current = Computation({}, "", {}, collections.defaultdict(list))
      name, entry = header[2], header[2] if header[1] else entry
    elif line == "}":
      computations[name] = current
      current = None
    elif current is not None and (start := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
      op = instruction(start[2], line[start.end() :])
      current.instructions[op.name] = op
      current = current._replace(root=op.name) if start[1] else current
      for operand in dict.fromkeys(op.operands):
        current.users[operand].append(op)
      if op.opcode == "parameter":
        current.parameters[int(op.argument)] = op.name
  return computations, entry


def _bits(dtype: str) -> int:
  """The bits of an element: 16 for bf16, 8 for f8e4m3fn and pred, 0 for tokens."""
  number = re.search(r"\d+", dtype)
  return int(number[0]) if number else 8 * (dtype == "pred")


def _closing(text: str, opening: int) -> int:
  """The index of the parenthesis that closes the one at `opening`. Raises ValueError if there is none."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, opening):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return match.start()
  raise ValueError(f"no closing parenthesis in {text[opening : opening + 80]!r}")
