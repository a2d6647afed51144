"""What a run would need and take on TPUs that are not there: its real training step, compiled for them ahead of time.

Everything here is arithmetic on a compiled program: the compiler's estimate, by parallel/hlo_cost.py. Nothing runs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from mc_jax.errors import ConfigError
from mc_jax.memory.rules import Rule
from mc_jax.parallel import attention, chips, hlo_cost, topology
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.training import state as states
from mc_jax.training import step
from mc_jax.training.config import Config


@dataclasses.dataclass(frozen=True)
class Plan:
  """A training step on a topology. Bytes and FLOPs are per chip and optimiser step where nothing else is said.

  Attributes:
    topology: with its slices, "v5p:4x4x4" or "2 x v5p:4x4x4".
    mesh: {axis: size}.
    parameters: numbers that are learned.
    fits: whether the compiler placed it in the chip's memory.
    hbm_capacity: bytes of a chip.
    hbm: {class of arrays: bytes}: what lies in a chip's memory, together what it needs.
    cached_memories: bytes of one layer's cached states, which are among the temporaries: with model.remat=full a layer
      has them only while it is computed.
    bytes_of: of a sequence's cache in decoding, see `cache_bytes`.
    compile_seconds: on the machine that compiled.
    refusal: the compiler's own words if it does not fit.
    cost: what the compiled step does; None if it does not fit.
    model_flops: of a step, on all chips: see `model_flops`.
    dense_steps: how many steps read all caches at first, model.memory.dense_steps.
    dense: the plan of one of these; None if there are none.
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
    """The plans, of the first steps and of the others, that do not fit."""
    return [plan for plan in (self.dense, self) if plan is not None and not plan.fits]

  @property
  def tokens_per_second(self) -> float:
    """Of all chips together."""
    return self.tokens / self.cost.time.step

  @property
  def utilisation(self) -> float:
    """Model FLOPs over what the chips' peak could do in the step's time."""
    return self.model_flops / (self.cost.time.step * self.chips * self.peak_flops)

  def to_json(self) -> dict:
    """All figures, and what follows from them, as JSON's types."""
    record = dataclasses.asdict(self) | {"dense": self.dense and self.dense.to_json()}
    if self.fits:
      seconds = self.cost.time
      record["cost"] |= {
        "kernels": {name: kernel._asdict() for name, kernel in self.cost.kernels.items()},
        "time": {**seconds._asdict(), "step": seconds.step, "nothing_hidden": seconds.unhidden},
      }
      record |= {"tokens_per_second": self.tokens_per_second, "model_flops_utilisation": self.utilisation}
    return record


def plan(config: Config, name: str, slices: int = 1) -> Plan:
  """Compiles the training steps of `config` for a topology, "v5p:4x4x4".

  Raises:
    ConfigError: settings that cannot work, or that do not fit the topology's devices.
  """
  config.check()
  dense = _plan(config.dense(), name, slices) if config.dense_steps else None
  return dataclasses.replace(_plan(config, name, slices), dense_steps=config.dense_steps, dense=dense)


def _plan(config: Config, name: str, slices: int) -> Plan:
  """The plan of one training step, the one that reads caches as `config` has it."""
  devices = topology_devices(name, slices)
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
  held = {"parameters": bytes_here(state.params), "optimiser state": bytes_here((state.opt_state, state.step))}
  start = time.monotonic()
  try:
    compiled = step.lower(config, mesh).compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    refusal = str(error).strip().splitlines()[0]
    hbm = held | {"temporaries": _asked_for(str(error)) or math.nan}
    return Plan(**figures, fits=False, hbm=hbm, compile_seconds=time.monotonic() - start, refusal=refusal)
  figures |= dict(compile_seconds=time.monotonic() - start)
  memory = compiled.memory_analysis()
  held["batch and metrics"] = (
    memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes - sum(held.values())
  )
  held |= {"temporaries": memory.temp_size_in_bytes, "program": memory.generated_code_size_in_bytes}
  cost_of = functools.partial(
    hlo_cost.cost,
    compiled,
    devices=list(mesh.devices.flat),
    kernel_flops=attention.kernel_flops,
    kernel_rate=functools.partial(chips.kernel_rate, head_dim=config.model.head_dim),
  )
  # Of the loops whose trips depend on data, rounds of an exchange between devices are one, if the choices of ssc are
  # not too uneven; where no kernels run, reads of caches loop as far as a query has any: over a sequence, half of them.
  cost = cost_of()
  if cost.unknown_loops and not any("write" in name for name in cost.kernels):
    cost = cost_of((len(config.model.memory.build_segmentation().lengths(config.data.length)) - 1) / 2)
  fits = sum(held.values()) <= chip.hbm_bytes
  return Plan(**figures, fits=fits, hbm=held, cost=cost, model_flops=model_flops(config, state, cost, len(devices)))


def refusal(plan: Plan) -> str:
  """Why a plan does not fit, what weighs most first, and what can be changed."""
  classes = sorted(plan.hbm.items(), key=lambda item: -item[1] if item[1] == item[1] else -math.inf)
  weights = ", ".join(f"{name} {gib(size)}" for name, size in classes if size != 0)
  lines = [f"error: does not fit {plan.topology}, {gib(plan.hbm_capacity)} of HBM a chip: {weights}"]
  if plan.cached_memories:
    lines.append(f"  among the temporaries: cached memories {gib(plan.cached_memories)} a layer")
  if plan.refusal:
    lines.append(f"  compiler: {plan.refusal}")
  lines.append(
    "  less of it on a chip: more chips, a larger mesh.fsdp or mesh.model, more train.microbatches, "
    "fewer rows (data.batch_size), a longer model.memory.segment_length"
  )
  return "\n".join(lines)


def gib(size: float) -> str:
  """Bytes for people."""
  if math.isnan(size):
    return "unknown"
  return f"{size / chips.GIB:,.2f} GiB" if size > chips.GIB / 10 else f"{size / 2**20:,.1f} MiB"


def topology_devices(name: str, slices: int) -> list[jax.Device]:
  """The devices of a topology.

  Raises:
    ConfigError: there is none of this name.
  """
  try:
    return topology.topology(name, slices).devices
  except (ImportError, RuntimeError, ValueError) as error:
    reason = str(error).strip().splitlines()[0]
    raise ConfigError(
      f"--topology={name}: {reason}. Topologies are such as v4:2x2x1, v5e:2x2 to v5e:16x16, v5p:2x2x1 to v5p:8x8x8, "
      "v6e:2x2 to v6e:16x16, tpu7x:2x2x1"
    ) from error


def model_flops(config: Config, state: states.TrainState, cost: hlo_cost.Cost, devices: int) -> float:
  """FLOPs that a step's mathematics needs, nothing computed twice: three times a forward pass.

  Of a forward pass two per token and number of the projections and the readout, and the FLOPs of the memories' (or the
  attention's) kernels, which under model.remat run forward twice. Memories that run without kernels are not counted.
  """
  leaves = {jax.tree_util.keystr(path): leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
  used = ("['kernel']", "['embedding']") if config.model.tied_embeddings else ("['kernel']",)
  numbers = sum(n for name, n in leaves.items() if name.endswith(used) and "_convolution" not in name)
  runs = 1 if config.model.remat == "none" else 2
  kernels = sum(kernel.flops for name, kernel in cost.kernels.items() if "fwd" in name) * devices / runs
  return 3 * (2 * numbers * config.data.batch_size * config.data.length + kernels)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A configuration that a sweep may compile, and a guess at what the compiler will say: to order them by.

  Attributes:
    seconds: of a step.
    hbm: bytes of a chip.
  """

  config: Config
  seconds: float
  hbm: float


def candidates(
  config: Config, name: str, slices: int, lengths: Sequence[int], segments: Sequence[int]
) -> list[Candidate]:
  """What could be run on a topology, the most promising first: each length and segment length on each mesh shape.

  A step keeps its tokens: longer rows are fewer. Meshes that rows, heads or segments do not divide among are left out;
  the axis "data" has the slices. Of every length and segment length the best comes before any second best.
  """
  devices = topology_devices(name, slices)
  chip, tokens = chips.of(devices), config.data.batch_size * config.data.length
  groups = []
  for length, segment in itertools.product(lengths, segments):
    memory = dataclasses.replace(
      config.model.memory, segment_length=segment, chunk=min(config.model.memory.chunk, segment)
    )
    data = dataclasses.replace(config.data, length=length, batch_size=max(tokens // max(length, 1), 1))
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory), data=data).check()
    group = []
    for fsdp, context, model in _factors(len(devices) // slices, 3):
      candidate = dataclasses.replace(changed, mesh=MeshConfig(slices, fsdp, context, model))
      try:
        sizes = candidate.check_devices(len(devices))
      except ConfigError:
        continue
      group.append(Candidate(candidate, *_guess(candidate, sizes, chip)))
    groups.append(sorted(group, key=lambda c: (c.hbm > chip.hbm_bytes, c.seconds)))
  ranked = itertools.zip_longest(*groups)
  return [candidate for rank in ranked for candidate in rank if candidate]


def _factors(n: int, parts: int) -> Iterator[tuple[int, ...]]:
  """All ways to write n as a product of so many numbers."""
  if parts == 1:
    yield (n,)
    return
  for first in (i for i in range(1, n + 1) if n % i == 0):
    for rest in _factors(n // first, parts - 1):
      yield (first, *rest)


def _guess(config: Config, sizes: dict[str, int], chip: chips.Chip) -> tuple[float, float]:
  """(seconds, bytes) by the few terms that differ most between meshes; only their order is of use."""
  model, memory, data = config.model, config.model.memory, config.data
  width, layers = model.d_model, model.layers
  numbers = layers * width * (6 * width + 3 * model.hidden_dim) + model.vocab_size * width
  sharded = sizes["fsdp"] * sizes["context"]
  rows = data.batch_size / config.train.microbatches / (sizes["data"] * sizes["fsdp"])
  residual = 2 * rows * data.length / sizes["context"] * width
  tokens = data.batch_size * data.length / math.prod(sizes.values())
  flops, write = 8 * numbers * tokens, 0.0
  if model.mixer == "memory_caching":
    caches = len(memory.build_segmentation().lengths(data.length))
    read = {"none": 0, "ssc": memory.top_k}.get(memory.aggregation, caches / 2)
    network = 2 * layers * model.heads * _memory_numbers(config) * tokens
    write = 16 * network
    flops += 4 * read * network
  else:
    flops += 16 * layers * width * tokens * data.length / 2 * (2 - 1 / sizes["context"])  # the last device's
  # Deep memories that go from segment to segment go from device to device: each waits for those before it.
  ring = memory.carry == "checkpoint" and model.mixer == "memory_caching" and memory.rule in ("dla", "titans")
  write *= (sizes["context"] + rows - 1) / rows if ring else 1
  links = 2 * chip.link
  seconds = (flops + write) / chip.flops / 0.5
  seconds += 8 * numbers / sizes["model"] / (chip.axes * links) * (sharded > 1)
  seconds += 12 * layers * config.train.microbatches * residual * (sizes["model"] - 1) / sizes["model"] / links
  if model.mixer == "transformer":  # keys and values are gathered, forward and twice backward, and scattered
    seconds += 8 * layers * config.train.microbatches * residual * (sizes["context"] - 1) / sizes["model"] / links
  held = 12 * numbers / sharded / sizes["model"] + (layers + 16) * residual
  held += 10 * residual / width * model.vocab_size / sizes["model"] / 2
  return seconds, held + 3 * cached_memories(config, sizes)


def cached_memories(config: Config, sizes: dict[str, int]) -> float:
  """Bytes of the states that a chip keeps of one layer: float32, momentum with them where there is any."""
  if config.model.mixer != "memory_caching":
    return 0.0
  rule, segments = config.model.memory.build_rule(), config.model.memory.build_segmentation()
  caches = len(segments.lengths(config.data.length)) / sizes["context"]
  rows = config.data.batch_size / config.train.microbatches / (sizes["data"] * sizes["fsdp"])
  heads = config.model.heads / sizes["model"]
  return 4 * caches * rows * heads * _state_numbers(rule, config.model.head_dim)


def _memory_numbers(config: Config) -> int:
  """Numbers in one head's memory."""
  rule = config.model.memory.build_rule()
  init = functools.partial(rule.init, heads=1, head_dim=config.model.head_dim)
  return sum(math.prod(w.shape) for w in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))


def _state_numbers(rule: Rule, head_dim: int) -> int:
  """Numbers in what one head's memory carries from segment to segment: momentum with it, where there is any."""

  def start(key):
    fresh = rule.init(key, heads=1, head_dim=head_dim)
    return rule.start(fresh, jnp.zeros((1, 1, 1, head_dim)))

  return sum(math.prod(w.shape) for w in jax.tree.leaves(jax.eval_shape(start, jax.random.key(0))))


def cache_bytes(config: Config) -> dict[str, float]:
  """Bytes, all layers, of a sequence's cache in decoding (data.length tokens), and of an equal Transformer's.

  Returns:
    checkpoint: of one cached memory, in the computation's dtype.
    sequence: of all of them, one a segment; none where aggregation="none".
    summaries: of the pooled keys beside them, float32.
    kv_cache: of a Transformer's keys and values, in the computation's dtype; of a Transformer, nothing else.
  """
  model, size = config.model, jnp.dtype(config.model.dtype).itemsize
  keys_and_values = 2 * model.layers * config.data.length * model.d_model * size
  if model.mixer != "memory_caching":
    return {"kv_cache": keys_and_values}
  memory = model.memory.as_read()
  caches = 0 if memory.aggregation == "none" else len(memory.build_segmentation().lengths(config.data.length))
  checkpoint = model.layers * model.heads * _memory_numbers(config) * size
  summaries = caches * model.layers * model.d_model * 4
  return {
    "checkpoint": checkpoint,
    "sequence": caches * checkpoint,
    "summaries": summaries,
    "kv_cache": keys_and_values,
  }


def bytes_here(tree) -> float:
  """Bytes of a tree's arrays on one device."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _asked_for(message: str) -> float | None:
  """Bytes that the compiler says it would need, temporaries alone or all together."""
  found = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?)", message)
  if not found:
    return None
  number, unit = (x for x in found.groups() if x is not None)
  return float(number) * 1024 ** " KMGT".index(unit or " ")
