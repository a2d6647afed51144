"""The memory and time that a run needs on TPUs, from its real training step compiled for them ahead of time.

Everything here is arithmetic on a compiled program (hlo_cost.py): the compiler's estimate. Nothing runs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
import sys
import time

import jax

from mc_jax.models import ModelConfig, memory_sizes
from mc_jax.models.attention import Attention
from mc_jax.parallel import attention, axes, chips
from mc_jax.planning import hlo_cost, topology
from mc_jax.training import state as states
from mc_jax.training import step, watchdog
from mc_jax.training.config import Config


@dataclasses.dataclass(frozen=True)
class Plan:
  """A training step on a topology. Bytes and FLOPs are per chip and optimiser step unless stated otherwise.

  Attributes:
    topology: The topology with its slices, "v5p:4x4x4" or "2 x v5p:4x4x4".
    mesh: {axis: size}.
    parameters: The number of learned parameters.
    fits: Whether everything fits a chip's memory.
    hbm_capacity: Bytes of HBM.
    hbm: {class of arrays: bytes}. The sum is what a chip needs.
    cached_memories: Bytes of one layer's cached states. They are among the temporaries: with model.remat=full a layer
      holds them only while it is computed.
    bytes_of: Bytes of a sequence's cache in decoding, see `cache_bytes`.
    tokens: Tokens per step, on all chips.
    chips: The number of devices.
    peak_flops: Peak bfloat16 FLOP/s.
    compile_seconds: Time the compilation took on this machine.
    refusal: The compiler's message if the step does not fit.
    cost: The compiled step's cost; None if the compiler refuses it.
    model_flops: FLOPs of a step on all chips, see `model_flops`.
    dense_steps: The number of initial steps that read all caches, model.memory.dense_steps.
    dense: The plan of one of those steps; None if there are none.
  """

  topology: str
  mesh: dict[str, int]
  parameters: int
  fits: bool
  hbm_capacity: float
  hbm: dict[str, float]
  cached_memories: float
  bytes_of: dict[str, float]
  tokens: int
  chips: int
  peak_flops: float
  compile_seconds: float
  refusal: str | None = None
  cost: hlo_cost.Cost | None = None
  model_flops: float | None = None
  dense_steps: int = 0
  dense: Plan | None = None

  @property
  def too_large(self) -> list[Plan]:
    """Those plans, of the dense steps and of the others, that do not fit."""
    return [plan for plan in (self.dense, self) if plan is not None and not plan.fits]

  @property
  def tokens_per_second(self) -> float:
    """Training speed of all chips together."""
    return self.tokens / self.cost.time.step

  @property
  def utilisation(self) -> float:
    """Model FLOPs as a share of the chips' peak over the step's time."""
    return self.model_flops / (self.cost.time.step * self.chips * self.peak_flops)

  def to_json(self) -> dict:
    """All figures, and those derived from them, as JSON types."""
    record = dataclasses.asdict(self) | {"dense": self.dense and self.dense.to_json()}
    if self.fits:
      seconds = self.cost.time
      record["cost"] |= {
        "kernels": {name: kernel._asdict() for name, kernel in self.cost.kernels.items()},
        "time": {**seconds._asdict(), "step": seconds.step, "nothing_hidden": seconds.unhidden},
      }
      record |= {"tokens_per_second": self.tokens_per_second, "model_flops_utilisation": self.utilisation}
    return record


def plan(config: Config, name: str, slices: int = 1, progress: str = "compiling the training step") -> Plan:
  """Compiles the training steps of `config` for a topology, and reports on standard error while it compiles.

  Args:
    config: The run's configuration.
    name: The topology, "v5p:4x4x4".
    slices: The number of slices.
    progress: What to report.

  Raises:
    ConfigError: Settings that cannot work, or that do not fit the topology's devices.
  """
  config.check()
  print(f"{progress} ... minutes for a large model", file=sys.stderr, flush=True)
  with watchdog.heartbeat(progress, file=sys.stderr):
    dense = _plan_step(config.dense(), name, slices) if config.dense_steps else None
    return dataclasses.replace(_plan_step(config, name, slices), dense_steps=config.dense_steps, dense=dense)


def _plan_step(config: Config, name: str, slices: int) -> Plan:
  """The plan of one training step that reads caches as `config` says."""
  devices = topology.devices(name, slices)
  mesh = config.make_mesh(devices)
  chip = chips.of(devices)
  state = states.abstract(config, mesh)
  figures = dict(
    topology=name if slices == 1 else f"{slices} x {name}",
    mesh=dict(mesh.shape),
    parameters=states.parameter_count(state),
    hbm_capacity=chip.hbm_bytes,
    cached_memories=cached_memories(config, mesh.shape),
    bytes_of=cache_bytes(config),
    tokens=config.data.batch_size * config.data.length,
    chips=len(devices),
    peak_flops=chip.flops,
  )
  used = {
    "parameters": bytes_per_device(state.params),
    "optimiser state": bytes_per_device((state.opt_state, state.step)),
  }
  start = time.monotonic()
  try:
    compiled = step.lower(config, mesh).compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    refusal = str(error).strip().splitlines()[0]
    hbm = used | {"temporaries": _requested_bytes(str(error)) or math.nan}
    return Plan(**figures, fits=False, hbm=hbm, compile_seconds=time.monotonic() - start, refusal=refusal)
  figures |= dict(compile_seconds=time.monotonic() - start)
  memory = compiled.memory_analysis()
  used["batch and metrics"] = (
    memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes - sum(used.values())
  )
  used |= {"temporaries": memory.temp_size_in_bytes, "program": memory.generated_code_size_in_bytes}
  cost_of = functools.partial(
    hlo_cost.cost,
    compiled,
    devices=list(mesh.devices.flat),
    kernel_flops=attention.kernel_flops,
    kernel_rate=functools.partial(kernel_rate, config.model),
  )
  # Loops whose trip count depends on data: an exchange between devices takes one round unless the choices of ssc are
  # very uneven. Without kernels, a read loops over the caches a query has: half of them, averaged over a sequence.
  cost = cost_of()
  if cost.unknown_loops and not any("write" in name for name in cost.kernels):
    cost = cost_of((len(config.model.memory.build_segmentation().lengths(config.data.length)) - 1) / 2)
  fits = sum(used.values()) <= chip.hbm_bytes
  return Plan(**figures, fits=fits, hbm=used, cost=cost, model_flops=model_flops(config, state, cost, len(devices)))


def refusal(plan: Plan) -> str:
  """Why a plan does not fit, the largest class of arrays first, and what to change."""
  classes = sorted(plan.hbm.items(), key=lambda item: -item[1] if item[1] == item[1] else -math.inf)
  weights = ", ".join(f"{name} {gib(size)}" for name, size in classes if size != 0)
  lines = [f"error: does not fit {plan.topology}, {gib(plan.hbm_capacity)} of HBM a chip: {weights}"]
  if plan.cached_memories:
    lines.append(f"  among the temporaries: cached memories {gib(plan.cached_memories)} a layer")
  if plan.refusal:
    lines.append(f"  compiler: {plan.refusal}")
  lines.append(
    "  to need less memory per chip: more chips, a larger mesh.fsdp or mesh.model, more train.microbatches, "
    "fewer rows (data.batch_size), a longer model.memory.segment_length"
  )
  return "\n".join(lines)


def gib(size: float) -> str:
  """Bytes as GiB or MiB."""
  if math.isnan(size):
    return "unknown"
  return f"{size / chips.GIB:,.2f} GiB" if size > chips.GIB / 10 else f"{size / 2**20:,.1f} MiB"


def kernel_rate(model: ModelConfig, name: str, chip: chips.Chip) -> float:
  """The share of the chip's peak that a kernel of this name is taken to reach in a model.

  Attention's kernels run at the width of the model's heads, memories' at that of their keys, model.memory.key_dim.
  """
  width = model.head_dim if name.startswith("splash") else memory_sizes.sizes(model).key_dim
  return chips.kernel_rate(name, chip, width)


def model_flops(config: Config, state: states.TrainState, cost: hlo_cost.Cost, devices: int) -> float:
  """FLOPs that a step requires without recomputation: three times those of a forward pass.

  A forward pass takes two FLOPs per token and parameter of the projections, the codebooks and the readout, plus those
  of the memory or attention kernels, which run forward twice under model.remat. Memories that run without kernels are not
  counted.
  """
  leaves = {jax.tree_util.keystr(path): leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
  used = ("['kernel']", "['codebooks']", *(["['embedding']"] if config.model.tied_embeddings else []))
  parameters = sum(n for name, n in leaves.items() if name.endswith(used) and "_convolution" not in name)
  runs = 1 if config.model.remat == "none" else 2
  kernels = sum(kernel.flops for name, kernel in cost.kernels.items() if "fwd" in name) * devices / runs
  return 3 * (2 * parameters * config.data.batch_size * config.data.length + kernels)


def cached_memories(config: Config, sizes: dict[str, int]) -> float:
  """Bytes of one layer's states on a chip, float32: those of the layer that has most."""
  rows = config.data.batch_size / config.train.microbatches / axes.shards("batch", sizes)
  row = max(kind.segment_bytes(config.model, config.data.length) for kind in config.model.mixers)
  return rows * row / (sizes["context"] * sizes["model"])


def cache_bytes(config: Config) -> dict[str, float]:
  """Bytes of a sequence's decoding cache (data.length tokens, all layers), and of an equally large Transformer's.

  Returns:
    checkpoint: One cached memory, in the compute dtype; absent where no layer has memories.
    sequence: All that is cached: memories, one per segment, or keys and values.
    summaries: The pooled keys stored with memories, float32; absent where no layer has memories.
    kv_cache: A Transformer's keys and values, in the compute dtype.
  """
  model, length, total = config.model, config.data.length, collections.Counter()
  for kind in model.mixers:
    total.update({name: model.repeats * size for name, size in kind.cache_bytes(model, length).items()})
  return {**total, "kv_cache": model.layers * Attention.cache_bytes(model, length)["sequence"]}


def bytes_per_device(tree) -> float:
  """Bytes of a tree's arrays on one device."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _requested_bytes(message: str) -> float | None:
  """The bytes that the compiler says it would need, for temporaries alone or in all."""
  found = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?)", message)
  if not found:
    return None
  number, unit = (x for x in found.groups() if x is not None)
  return float(number) * 1024 ** " KMGT".index(unit or " ")
