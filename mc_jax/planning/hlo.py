"""A compiled program as data, from its text: `compiled.as_text()`, the optimised HLO of XLA:TPU or XLA:CPU.

`Module` also runs what it can of a program's integer scalars, which is how the trips of a loop are found.
"""

import collections
import math
import operator
import re
from typing import Any, NamedTuple

import numpy as np

# Operations whose result has the elements of their operand.
SAME_ELEMENTS = {"bitcast", "reshape", "copy", "convert", "transpose"}
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


class Array(NamedTuple):
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
    """In its layout, padded to whole tiles."""
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
  arrays: tuple[Array, ...]  # the leaves of its type
  opcode: str
  operands: tuple[str, ...]
  argument: str  # the text between the parentheses
  attributes: str

  def attribute(self, name: str, pattern: str = r"%?([\w.\-]+)") -> str | None:
    """The first group of the pattern that follows "name="; None if it has no such attribute."""
    found = re.search(rf"\b{name}={pattern}", self.attributes)
    return found and found[1]

  def called(self) -> list[str]:
    """The computations it runs: a fusion's, a call's, the branches of a conditional."""
    names = re.findall(
      r"\b(?:calls|to_apply|branch_computations|\w+_computation)=(\{[^}]*\}|%[\w.\-]+)", self.attributes
    )
    return re.findall(r"%([\w.\-]+)", " ".join(names))


class Computation(NamedTuple):
  """Instructions that run together: a fusion's, a loop's body, ..."""

  instructions: dict[str, Instruction]  # by name, in order
  root: str  # the name of the one whose value is the result
  parameters: dict[int, str]  # names, by number
  users: dict[str, list[Instruction]]  # of the value of a name


class Module:
  """A program.

  Attributes:
    computations: by name.
    entry: the name of the one that it starts with.
  """

  def __init__(self, text: str):
    self.computations, self.entry = _parse(text)

  def trips(self, condition: str, body: str, state: Any) -> int | None:
    """Runs a loop on what is known of its state; None if that does not tell when it ends."""
    for trips in range(_MAX_TRIPS):
      goes_on = self.evaluate(condition, self.computations[condition].root, [state])
      if not goes_on:
        return None if goes_on is None else trips
      state = self.evaluate(body, self.computations[body].root, [state])
    return None

  def invariant(self, body: str, state: Any) -> Any:
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

  def evaluate(self, where: str, name: str, values: list, memo: dict | None = None) -> Any:
    """The value of an integer scalar, or a list of them for a tuple; None for what is not known.

    Args:
      where: a computation.
      name: of the instruction in it.
      values: of the computation's parameters.
      memo: {name: value} of what was evaluated there before.
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
  """The devices of a collective's first group, as places in the mesh; none if it does not say."""
  if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)", op.attributes):
    return [int(pairs[1]), int(pairs[2])]
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", op.attributes):
    return [int(i) for i in listed[1].split(",")]
  # iota: so many groups of so many, of 0, 1, 2, ... in this shape, transposed.
  if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", op.attributes):
    groups, shape, order = ([int(i) for i in part.split(",")] if part else None for part in iota.groups())
    return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(groups)[0].tolist()
  # A mesh and the axes along which a group lies, some of them parts of an axis: 'x':(2)4 is 4 after the first 2.
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", op.attributes):
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
    places, index, stride = np.zeros(1, int), {}, 1
    for name in reversed(sizes):
      index[name], stride = stride, stride * sizes[name]
    for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[2]):
      size = int(part or sizes[name])
      step = index[name] * sizes[name] // (int(before or 1) * size)
      places = (places[:, None] + step * np.arange(size)).ravel()
    return places.tolist()
  return []


def instruction(name: str, text: str) -> Instruction:
  """An instruction from its text after "name = ": type opcode(operands), attributes."""
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
  """The computations of an HLO module's text, by name, and the name of the one that it starts with."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
      current = Computation({}, "", {}, collections.defaultdict(list))
      name, entry = header[2], header[2] if header[1] else entry
    elif line == "}":
      computations[name] = current
      current = None
    elif current is not None and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
      op = instruction(found[2], line[found.end() :])
      current.instructions[op.name] = op
      current = current._replace(root=op.name) if found[1] else current
      for operand in dict.fromkeys(op.operands):
        current.users[operand].append(op)
      if op.opcode == "parameter":
        current.parameters[int(op.argument)] = op.name
  return computations, entry


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
