"""What a compiled program does in all: FLOPs, HBM traffic, collectives and time, each loop's body times its trips.

XLA's own `cost_analysis()` counts a loop's body once, whatever its trip count, and an array in VMEM as one in HBM. This
one reads the optimised HLO (hlo.py):

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
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mc_jax.parallel import chips
from mc_jax.planning import hlo


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


# What moves no data, or what its other half, -start, is charged for.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}
_COLLECTIVES = r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-\w+)(-start)?$"
_OF_COLLECTIVES = ("collective", "waited", "beside")
_SLICES = {"dynamic-slice", "slice", "gather"}


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
    self.module = hlo.Module(text)
    self.computations = self.module.computations
    self.kernel_flops, self.kernel_rate = kernel_flops, kernel_rate
    self.devices = devices
    self.chip = chips.of(devices) if devices else None
    self.extent = chips.extent(devices) if devices else None

  def cost(self) -> collections.Counter:
    return self._computation(self.module.entry, [])

  def _computation(self, name: str, values: list) -> collections.Counter:
    """values: what is known of the parameters, see hlo.Module.evaluate."""
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
      return collections.Counter()  # a piece of one that another fusion starts, beside other operations
    put, got = (sum(a.bytes for source in ops for a in source.arrays) for ops in (operands, [op]))
    if op.opcode.endswith("-start"):
      got = got - put if got > put else put  # its type holds the operands too
    if where.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"  # XLA:TPU fuses an all-reduce and the slice of it
    group = hlo.group(op) or list(range(len(self.devices) if self.devices else 2))
    sent = chips.sent(kind, put, got, len(group))
    total = collections.Counter({("collective", kind): sent})
    if self.chip:
      devices = [self.devices[i] for i in group]
      total["beside" if started else "waited",] = chips.seconds(self.chip, kind, sent, devices, self.extent)
    return total

  def _bytes(self, computation: hlo.Computation, op: hlo.Instruction, operands: list[hlo.Instruction]) -> float:
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

  def _fusion_bytes(self, fused: hlo.Computation, op: hlo.Instruction, operands: list[hlo.Instruction]) -> float:
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
        written = fused.instructions[update.operands[_UPDATES[update.opcode]]].arrays[0] if update else array
        total += written._replace(bits=array.bits).bytes
    return total

  def _read(self, fused: hlo.Computation, name: str, array: hlo.Array, in_place: set[int]) -> float:
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
      elif user.opcode in hlo.SAME_ELEMENTS and user.name != fused.root:
        total += self._read(fused, user.name, array, in_place)
      else:
        return array.bytes
    return min(total, array.bytes) if fused.users.get(name) else array.bytes

  def _kernel(self, op: hlo.Instruction, operands: list[hlo.Instruction]) -> collections.Counter:
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


# Operations that make their first operand's array anew, and which operand is what is new in it.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


def _updates(fused: hlo.Computation) -> list[hlo.Instruction | None]:
  """For every result of a fusion, the update that makes it in place."""
  root = fused.instructions[fused.root]
  if root.opcode == "tuple":
    return [_updated(fused, fused.instructions[name]) for name in root.operands]
  return [_updated(fused, root)] * len(root.arrays)  # more than one: a reduction to a pair, such as argmax


def _updated(fused: hlo.Computation, result: hlo.Instruction) -> hlo.Instruction | None:
  """The update of a parameter that a fusion's result is, made in place; None if it is none."""

  def behind(op):
    while op.opcode == "bitcast":
      op = fused.instructions[op.operands[0]]
    return op

  update = behind(result)
  if update.opcode in _UPDATES and behind(fused.instructions[update.operands[0]]).opcode == "parameter":
    return update
  return None


def _product_flops(op: hlo.Instruction, a: hlo.Array, b: hlo.Array) -> int:
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
