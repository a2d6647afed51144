"""Estimates the total cost of a compiled program: FLOPs, HBM traffic, collectives and time.

XLA's own `cost_analysis()` counts the body of a loop once, whatever its trip count, and arrays in VMEM as if they were
in HBM. This estimate reads the optimised HLO (hlo.py):

* The body of a loop counts once per trip. The number of trips is XLA's `known_trip_count` or, since XLA:TPU does not
  print it, comes from evaluating the loop's integer scalars.
* A fusion is one operation that reads its operands and writes its results; intermediate values cost nothing. An operand
  that it reads only through a slice or a gather counts as the slice, and a result that it updates in place as the
  update.
* An array has the size of its layout, padded to whole tiles: f32[4096, 1] can take as much as f32[4096, 128] on a TPU.
* A Pallas kernel costs what its `pl.CostEstimate` states.
* A collective costs the bytes that a device sends in the ring algorithm, for the group in `replica_groups`. A
  collective that XLA splits into pieces between other operations counts once.

On TPUs, an operation takes the time that XLA:TPU estimates (`estimated_cycles`), and at least as long as its FLOPs and
bytes take at the chip's peak. XLA does not estimate the cycles of a kernel; it takes as long as its bytes, or as its
FLOPs at the rate of its schedule (chips.py), whichever is longer. Copies that XLA starts in advance overlap with other
operations, unless all bytes together take longer. For collectives see `Time`.

This is arithmetic on a program's text, not a measurement: it ignores contention, latency and the host.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mc_jax.parallel import chips
from mc_jax.planning import hlo


class Kernel(NamedTuple):
  """The number of calls of a Pallas kernel, and the total FLOPs and bytes of their `pl.CostEstimate`s."""

  calls: float
  flops: float
  bytes: float


class Time(NamedTuple):
  """Estimated seconds of one execution, on each device.

  Attributes:
    compute: Seconds of everything except collectives.
    waited: Seconds of synchronous collectives, during which nothing else runs.
    beside: Seconds of asynchronous collectives, which run beside other operations.
    classes: `compute` divided by kernel or kind of operation, {name: seconds}.
  """

  compute: float
  waited: float
  beside: float
  classes: dict[str, float]

  @property
  def step(self) -> float:
    """Total seconds, assuming that asynchronous collectives overlap with computation as far as possible."""
    return max(self.compute, self.beside) + self.waited

  @property
  def unhidden(self) -> float:
    """Total seconds if no collective overlapped with computation."""
    return self.compute + self.beside + self.waited


@dataclasses.dataclass(frozen=True)
class Cost:
  """The cost of one execution, for each device.

  Attributes:
    flops: FLOPs of matrix products and convolutions, two per multiply-add, and of kernels; elementwise operations are
      not counted.
    hbm_bytes: Bytes read from and written to the device's main memory, including those of kernels and excluding those
      of collectives.
    collective_bytes: {kind: bytes that a device sends}, where kinds are "all-gather", ..., and "kernel" for what
      kernels send themselves.
    kernels: {name: Kernel}; included in flops and hbm_bytes.
    unknown_loops: Loops whose number of trips is unknown, as "instruction (its op_name)".
    unestimated_kernels: Kernels without a `pl.CostEstimate`, counted as the bytes of their operands and results and no
      FLOPs.
    time: The estimated time; None if `cost` was not given the devices.
  """

  flops: float
  hbm_bytes: float
  collective_bytes: dict[str, float]
  kernels: dict[str, Kernel]
  unknown_loops: tuple[str, ...]
  unestimated_kernels: tuple[str, ...]
  time: Time | None = None


# From a kernel's name and its operands' shapes to the FLOPs of a call; None for unknown kernels.
KernelFlops = Callable[[str, Sequence[tuple[int, ...]]], float | None]


def cost(
  compiled: jax.stages.Compiled,
  unknown_trips: float = 1,
  *,
  devices: Sequence[jax.Device] | None = None,
  kernel_flops: KernelFlops = lambda name, shapes: None,
  kernel_rate: Callable[[str, chips.Chip], float] = chips.kernel_rate,
) -> Cost:
  """The cost of one execution of a compiled function; a conditional costs as much as its most expensive branch.

  Args:
    compiled: The result of `jax.jit(f).lower(...).compile()`, for TPU or CPU.
    unknown_trips: The number of trips to assume for loops in `unknown_loops`, such as the mean of a traced bound.
    devices: The TPUs that the function is compiled for, in the order of its mesh (`mesh.devices.flat`), to estimate
      times; None: no times.
    kernel_flops: The FLOPs of kernels without a `pl.CostEstimate`.
    kernel_rate: A function from a kernel's name and the chip to the share of the chip's peak that it reaches.
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


# Operations that move no data.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}
_COLLECTIVES = r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-\w+)(-start)?$"
_OF_COLLECTIVES = ("collective", "waited", "beside")
_SLICES = {"dynamic-slice", "slice", "gather"}


class _Program:
  """An HLO module whose computations can be charged. Costs are counters, {(kind, *name): amount}."""

  def __init__(
    self,
    text: str,
    unknown_trips: float,
    devices: Sequence[jax.Device] | None = None,
    kernel_flops: KernelFlops = lambda name, shapes: None,
    kernel_rate: Callable[[str, chips.Chip], float] = chips.kernel_rate,
  ):
    self.unknown_trips = unknown_trips
    self.module = hlo.Module(text)
    self.computations = self.module.computations
    self.kernel_flops, self.kernel_rate = kernel_flops, kernel_rate
    self.devices = devices
    self.chip = chips.of(devices) if devices else None
    self.extent = chips.extent(devices) if devices else None

  def cost(self) -> collections.Counter:
    return self._computation(self.module.entry, [])

  def _computation(self, name: str, values: list) -> collections.Counter:
    """The cost of a computation whose parameters have the known values `values`, see hlo.Module.evaluate."""
    operations = self.computations[name].instructions.values()
    return sum((self._instruction(name, op, values) for op in operations), collections.Counter())

  def _instruction(self, where: str, op: hlo.Instruction, values: list) -> collections.Counter:
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
      kind = "matrix products" if total["flops",] else "layout" if op.opcode in hlo.SAME_ELEMENTS else "elementwise"
      total["seconds", kind] = self._seconds(op, total["flops",], total["hbm",])
    return total

  def _seconds(self, op: hlo.Instruction, flops: float, size: float) -> float:
    cycles = re.search(r'"estimated_cycles":"(\d+)"', op.attributes)
    return max(
      int(cycles[1]) / self.chip.clock if cycles else 0.0, flops / self.chip.flops, size / self.chip.hbm_bandwidth
    )

  def _collective(
    self, where: str, op: hlo.Instruction, operands: list[hlo.Instruction], kind: str
  ) -> collections.Counter:
    fused = {x.attribute("custom_call_target", r'"(\w+)') for x in self.computations[where].instructions.values()}
    started = op.opcode.endswith("-start") or "AsyncCollectiveStart" in fused
    if "async_collective_fusion_config" in op.attributes and not started:
      return collections.Counter()  # a piece of a collective that another fusion starts
    put, got = (sum(a.bytes for source in ops for a in source.arrays) for ops in (operands, [op]))
    if op.opcode.endswith("-start"):
      got = got - put if got > put else put  # the type of its result includes the operands
    if where.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"  # XLA:TPU fuses an all-reduce with the slice of its result
    group = hlo.group(op) or list(range(len(self.devices) if self.devices else 2))
    sent = chips.sent(kind, put, got, len(group))
    total = collections.Counter({("collective", kind): sent})
    if self.chip:
      devices = [self.devices[i] for i in group]
      total["beside" if started else "waited",] = chips.seconds(self.chip, kind, sent, devices, self.extent)
    return total

  def _bytes(self, computation: hlo.Computation, op: hlo.Instruction, operands: list[hlo.Instruction]) -> float:
    """HBM bytes of an operation outside fusions."""
    # An asynchronous operation's type is (result, operand, ...) for copies and ((operands), result, ...) for slices.
    result = op.arrays
    if op.opcode.endswith("-start"):
      result = op.arrays[:1] if op.opcode == "copy-start" else op.arrays[len(op.operands) : len(op.operands) + 1]
    sliced = op.opcode.removesuffix("-start") in _SLICES
    if op.opcode in ("dynamic-update-slice", "scatter"):  # in place: only the update is read and written
      target, update = operands[0].arrays[0], computation.instructions[op.operands[-1 if op.opcode == "scatter" else 1]]
      return update.arrays[0].bytes * (target.in_hbm + update.arrays[0].in_hbm)
    read = 0.0
    for i, source in enumerate(operands):
      arrays = [a for a in source.arrays if a.in_hbm]
      read += sum(a.bytes for a in (result if sliced and i == 0 and arrays else arrays))
    return read + sum(a.bytes for a in result if a.in_hbm)

  def _fusion_bytes(self, fused: hlo.Computation, op: hlo.Instruction, operands: list[hlo.Instruction]) -> float:
    """HBM bytes of a fusion: the parts of its operands that it reads and of its results that it writes."""
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
      forwarded = sources and (sources[i] == "parameter" or re.match(_COLLECTIVES, sources[i]))
      if array.in_hbm and not forwarded:
        written = fused.instructions[update.operands[_UPDATES[update.opcode]]].arrays[0] if update else array
        total += written._replace(bits=array.bits).bytes
    return total

  def _read(self, fused: hlo.Computation, name: str, array: hlo.Array, in_place: set[int]) -> float:
    """The bytes that a fused computation reads of the operand `array`, its value `name`; at most the array's size."""
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
        continue  # sent by the collective, or returned unchanged
      elif user.opcode in hlo.SAME_ELEMENTS and user.name != fused.root:
        total += self._read(fused, user.name, array, in_place)
      else:
        return array.bytes
    return min(total, array.bytes) if fused.users.get(name) else array.bytes

  def _kernel(self, op: hlo.Instruction, operands: list[hlo.Instruction]) -> collections.Counter:
    # Transformations wrap the kernel's own name: ".../transpose(jvp(NAME))/pallas_call".
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

  def _loop(self, where: str, op: hlo.Instruction, values: list) -> collections.Counter:
    condition, body = op.attribute("condition"), op.attribute("body")
    state = self.module.evaluate(where, op.operands[0], values)
    total = collections.Counter()
    if known := re.search(r'"known_trip_count":\{"n":"?(\d+)', op.attributes):
      trips = int(known[1])
    elif (trips := self.module.trips(condition, body, state)) is None:
      trips = self.unknown_trips
      source = op.attribute("op_name", r'"([^"]*)')
      total["unknown loop", f"{op.name} ({source})"] = 1
    each = self._computation(body, [self.module.invariant(body, state)]) + self._computation(condition, [])
    total.update({key: value * (1 if key[0] == "unknown loop" else trips) for key, value in each.items()})
    return total


# Operations that update their first operand, and the number of the operand that is the update.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


def _updates(fused: hlo.Computation) -> list[hlo.Instruction | None]:
  """For each result of a fusion, the update that writes it in place; None if it is written whole."""
  root = fused.instructions[fused.root]
  if root.opcode == "tuple":
    return [_updated(fused, fused.instructions[name]) for name in root.operands]
  return [_updated(fused, root)] * len(root.arrays)  # more than one: a reduction to a pair, such as argmax


def _updated(fused: hlo.Computation, result: hlo.Instruction) -> hlo.Instruction | None:
  """The instruction that makes `result` an update of a fusion's parameter in place; None if it is not one."""

  def without_bitcasts(op):
    while op.opcode == "bitcast":
      op = fused.instructions[op.operands[0]]
    return op

  update = without_bitcasts(result)
  if update.opcode in _UPDATES and without_bitcasts(fused.instructions[update.operands[0]]).opcode == "parameter":
    return update
  return None


def _product_flops(op: hlo.Instruction, a: hlo.Array, b: hlo.Array) -> int:
  """FLOPs of a dot or a convolution, two per multiply-add outside padding."""
  result = op.arrays[0].dims
  if op.opcode == "dot":
    contracted = op.attribute("lhs_contracting_dims", r"\{([\d,]*)\}")
    return 2 * math.prod(result) * math.prod(a.dims[int(i)] for i in contracted.split(",") if i)
  # On TPUs batched products are convolutions too, with strides and dilation that leave one position of each window.
  inputs, kernel, outputs = re.split(r"_|->", op.attribute("dim_labels", r"([\w>\-]+)"))
  total = 2 * result[outputs.index("b")] * result[outputs.index("f")] * b.dims[kernel.index("i")]
  window = {
    key: value.split("x")
    for key, value in re.findall(r"(\w+)=([\dx_\-]+)", op.attribute("window", r"\{([^}]*)\}") or "")
  }
  for i in range(len(inputs) - 2):
    stride, input_dilation, kernel_dilation = (
      int(window[key][i]) if key in window else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
    )
    before = int(window["pad"][i].split("_")[0]) if "pad" in window else 0
    places = np.arange(result[outputs.index(str(i))])[:, None] * stride - before
    places = places + np.arange(b.dims[kernel.index(str(i))]) * kernel_dilation
    last = (a.dims[inputs.index(str(i))] - 1) * input_dilation
    inside = (places >= 0) & (places <= last) & (places % input_dilation == 0)
    total *= int(inside.sum())
  return total
