"""What a compiled program does in all: FLOPs, HBM traffic, collectives and time, each loop's body times its trips.

XLA's own `cost_analysis()` counts a loop's body once, whatever its trip count, and an array in VMEM as one in HBM. This
one reads the optimised HLO, `compiled.as_text()` of XLA:TPU or XLA:CPU:

* A loop's trips are XLA's `known_trip_count`, or found by running the loop's integer scalars (XLA:TPU prints no count).
* A fusion is one operation: it reads its operands and writes its results, and nothing in between. What it reads only
  through a slice or a gather is charged the slice; what it updates in place, the update.
* An array has the size that its layout gives it, padded to whole tiles: f32[4096, 1] can be f32[4096, 128] on a TPU.
* A Pallas kernel is worth what its `pl.CostEstimate` says.
* A collective is charged what a device sends by the ring algorithm, its group read from `replica_groups`; one that XLA
  cut into pieces between other operations counts once.

For TPUs, an operation's time is the estimate that XLA:TPU prints beside it (`estimated_cycles`), and no less than its
FLOPs and bytes take at the chip's peak; a kernel's, whose cycles XLA does not know, the longer of its bytes and of its
FLOPs at the rate of its schedule (chips.py). Copies that XLA starts ahead run beside other operations, unless all bytes
together take longer than those. Collectives: see `Time`.

It is arithmetic on a program's text, not a measurement: it knows nothing of contention, of latency or of the host.
"""

import collections
import dataclasses
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mc_jax.parallel import chips


class Kernel(NamedTuple):
  """A Pallas kernel, all its calls together: how many, and the FLOPs and bytes of their `pl.CostEstimate`s."""

  calls: float
  flops: float
  bytes: float


class Time(NamedTuple):
  """Estimated seconds of one execution, on each device.

  Attributes:
    compute: of everything but collectives.
    waited: of collectives that nothing else runs beside.
    beside: of collectives that XLA started ahead of what needs them (asynchronous ones).
    classes: compute, by what takes it: {a kernel's name, or the kind of operation: seconds}.
  """

  compute: float
  waited: float
  beside: float
  classes: dict[str, float]

  @property
  def step(self) -> float:
    """Seconds in all: asynchronous collectives are taken to hide behind computation as far as there is any."""
    return max(self.compute, self.beside) + self.waited

  @property
  def unhidden(self) -> float:
    """Seconds in all if no collective were hidden."""
    return self.compute + self.beside + self.waited


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one execution costs each device.

  Attributes:
    flops: of matrix products and convolutions, two a multiply-add, and of kernels. Elementwise work is not in it.
    hbm_bytes: read from and written to the device's main memory, kernels included, collectives not.
    collective_bytes: {kind ("all-gather", ...): bytes that a device sends}; "kernel" is what kernels send themselves.
    kernels: {name: Kernel}, part of flops and hbm_bytes.
    unknown_loops: loops whose trips are not known, as "instruction (where it comes from)".
    unestimated_kernels: kernels without a `pl.CostEstimate`, taken for their operands' and results' bytes and no FLOPs.
    time: if `cost` was told the devices.
  """

  flops: float
  hbm_bytes: float
  collective_bytes: dict[str, float]
  kernels: dict[str, Kernel]
  unknown_loops: tuple[str, ...]
  unestimated_kernels: tuple[str, ...]
  time: Time | None = None


# Of a kernel's name and its operands' shapes: the FLOPs of a call, None for a name that it does not know.
KernelFlops = Callable[[str, Sequence[tuple[int, ...]]], float | None]


def cost(
  compiled: jax.stages.Compiled,
  unknown_trips: float = 1,
  *,
  devices: Sequence[jax.Device] | None = None,
  kernel_flops: KernelFlops = lambda name, shapes: None,
  kernel_rate: Callable[[str, chips.Chip], float] = chips.kernel_rate,
) -> Cost:
  """The cost of one execution of a compiled function, of a conditional the costlier branch.

  Args:
    compiled: of `jax.jit(f).lower(...).compile()`, for TPU or CPU.
    unknown_trips: how often the loops in `unknown_loops` are taken to run, for example the mean of a traced bound.
    devices: the TPUs that it is compiled for, in the order of its mesh (`mesh.devices.flat`): to estimate times.
    kernel_flops: for kernels without a `pl.CostEstimate`.
    kernel_rate: of a kernel's name and the chip, the share of the chip's peak that it reaches.
  """
  total = _Program(compiled.as_text(), unknown_trips, devices, kernel_flops, kernel_rate).cost()

  def named(kind):
    return {key[1]: value for key, value in total.items() if key[0] == kind}

  calls, flops, size = (named(kind) for kind in ("kernel calls", "kernel flops", "kernel bytes"))
  time = None
  if devices:
    classes = named("seconds")
    compute = sum(classes.values())
    copies = total["hbm",] / chips.of(devices).hbm_bandwidth - compute
    if copies > 0:
      classes["copies beyond all else"] = copies
    time = Time(max(compute, compute + copies), total["waited",], total["beside",], classes)
  return Cost(
    flops=total["flops",],
    hbm_bytes=total["hbm",],
    collective_bytes=named("collective"),
    kernels={name: Kernel(calls[name], flops.get(name, 0), size.get(name, 0)) for name in calls},
    unknown_loops=tuple(named("unknown loop")),
    unestimated_kernels=tuple(named("unestimated kernel")),
    time=time,
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
_OF_COLLECTIVES = ("collective", "waited", "beside")
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

  def __init__(
    self,
    text: str,
    unknown_trips: float,
    devices: Sequence[jax.Device] | None = None,
    kernel_flops: KernelFlops = lambda name, shapes: None,
    kernel_rate: Callable[[str, chips.Chip], float] = chips.kernel_rate,
  ):
    self.unknown_trips = unknown_trips
    self.computations, self.entry = _parse(text)
    self.kernel_flops, self.kernel_rate = kernel_flops, kernel_rate
    self.devices = devices
    self.chip = chips.of(devices) if devices else None
    self.extent = chips.extent(devices) if devices else None

  def cost(self) -> collections.Counter:
    return self._computation(self.entry, [])

  def _computation(self, name: str, values: list) -> collections.Counter:
    """values: what is known of the parameters, see _evaluate."""
    operations = self.computations[name].instructions.values()
    return sum((self._instruction(name, op, values) for op in operations), collections.Counter())

  def _instruction(self, where: str, op: _Instruction, values: list) -> collections.Counter:
    computation = self.computations[where]
    operands = [computation.instructions[name] for name in dict.fromkeys(op.operands)]
    if op.opcode in _FREE or op.opcode.endswith(("-done", "-update")) or '"AllocateBuffer"' in op.attributes:
      return collections.Counter()
    if op.opcode == "while":
      return self._loop(where, op, values)
    if op.opcode == "conditional":
      branches = [self._computation(name, []) for name in op.called()]
      return max(
        branches, key=lambda b: (sum(n for key, n in b.items() if key[0] == "seconds"), b["flops",], b["hbm",])
      )
    if op.opcode in ("call", "async-start"):
      return sum((self._computation(name, []) for name in op.called()), collections.Counter())
    if kind := re.match(_COLLECTIVES, op.opcode):
      return self._collective(where, op, operands, kind[1])
    if op.opcode == "custom-call" and '"tpu_custom_call"' in op.attributes:
      return self._kernel(op, operands)
    if op.opcode == "fusion":
      inner = self._computation(op.called()[0], [])
      total = collections.Counter({key: n for key, n in inner.items() if key[0] in ("flops", *_OF_COLLECTIVES)})
      total["hbm",] = self._fusion_bytes(self.computations[op.called()[0]], op, operands)
    else:
      total = collections.Counter({("hbm",): self._bytes(computation, op, operands)})
      if op.opcode in ("dot", "convolution"):
        total["flops",] = _product_flops(op, *(computation.instructions[name].arrays[0] for name in op.operands[:2]))
    if self.chip and not op.opcode.endswith("-start"):
      kind = "matrix products" if total["flops",] else "layout" if op.opcode in _SAME_ELEMENTS else "elementwise"
      total["seconds", kind] = self._seconds(op, total["flops",], total["hbm",])
    return total

  def _seconds(self, op: _Instruction, flops: float, size: float) -> float:
    cycles = re.search(r'"estimated_cycles":"(\d+)"', op.attributes)
    return max(
      int(cycles[1]) / self.chip.clock if cycles else 0.0, flops / self.chip.flops, size / self.chip.hbm_bandwidth
    )

  def _collective(self, where: str, op: _Instruction, operands: list[_Instruction], kind: str) -> collections.Counter:
    fused = {x.attribute("custom_call_target", r'"(\w+)') for x in self.computations[where].instructions.values()}
    started = op.opcode.endswith("-start") or "AsyncCollectiveStart" in fused
    if "async_collective_fusion_config" in op.attributes and not started:
      return collections.Counter()  # a piece of one that another fusion starts, beside other operations
    put, got = (sum(a.bytes for source in ops for a in source.arrays) for ops in (operands, [op]))
    if op.opcode.endswith("-start"):
      got = got - put if got > put else put  # its type holds the operands too
    if where.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"  # XLA:TPU fuses an all-reduce and the slice of it
    group = _group(op) or list(range(len(self.devices) if self.devices else 2))
    sent = chips.sent(kind, put, got, len(group))
    total = collections.Counter({("collective", kind): sent})
    if self.chip:
      devices = [self.devices[i] for i in group]
      total["beside" if started else "waited",] = chips.seconds(self.chip, kind, sent, devices, self.extent)
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
    root = fused.instructions[fused.root]
    sources = [fused.instructions[name].opcode for name in root.operands] if root.opcode == "tuple" else []
    for i, (array, update) in enumerate(zip(op.arrays, updates, strict=True)):
      handed_on = sources and (sources[i] == "parameter" or re.match(_COLLECTIVES, sources[i]))
      if array.in_hbm and not handed_on:
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
      elif re.match(_COLLECTIVES, user.opcode) or (user.opcode == "tuple" and user.name == fused.root):
        continue  # sent, or handed on as it is
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
      flops = self.kernel_flops(name, [a.dims for source in operands for a in source.arrays])
      if flops is None:
        flops, total["unestimated kernel", name] = 0, 1
      size = sum(a.bytes for source in (*operands, op) for a in source.arrays if a.in_hbm)
    total.update({("flops",): flops, ("hbm",): size, ("kernel flops", name): flops, ("kernel bytes", name): size})
    if self.chip:
      rate = self.kernel_rate(name, self.chip)
      total["seconds", name] = max(flops / (rate * self.chip.flops), size / self.chip.hbm_bandwidth)
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


def _group(op: _Instruction) -> list[int]:
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
