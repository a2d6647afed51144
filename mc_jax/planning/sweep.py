"""Which meshes, lengths and segment lengths to compile first, and the sweep that compiles them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence

from mc_jax.errors import ConfigError
from mc_jax.parallel import axes, chips
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.planning import plans, report, topology
from mc_jax.planning.plans import Plan
from mc_jax.training.config import Config
from mc_jax.training.progress import duration


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A configuration that a sweep may compile, with a rough estimate to rank it by.

  Attributes:
    config: The configuration.
    seconds: Estimated time of a step.
    hbm: Estimated bytes per chip.
  """

  config: Config
  seconds: float
  hbm: float


def sweep(
  config: Config, name: str, slices: int, lengths: Sequence[int], segments: Sequence[int], meshes: int
) -> list[Plan]:
  """Compiles the most promising candidates; prints each as it is compiled, then all of them, the fastest first.

  Args:
    config: The run's configuration.
    name: The topology, "v5p:4x4x4".
    slices: The number of slices.
    lengths: Values of data.length; none: the configuration's.
    segments: Values of model.memory.segment_length; none: the configuration's.
    meshes: The number of meshes to compile for each length and segment length.

  Raises:
    ConfigError: No mesh divides the rows, heads and segments.
  """
  lengths, segments = lengths or [config.data.length], segments or [config.model.memory.segment_length]
  chosen = candidates(config, name, slices, lengths, segments)[: meshes * len(lengths) * len(segments)]
  if not chosen:
    raise ConfigError(f"no mesh of {name} divides the rows, heads and segments of this configuration")
  print(f"{len(chosen)} to compile, the most promising first ({report.ESTIMATE})", flush=True)
  compiled, start = [], time.monotonic()
  for number, candidate in enumerate(chosen, 1):
    count = f"[{number}/{len(chosen)}]"
    plan = plans.plan(candidate.config, name, slices, f"compiling {count}")
    compiled.append((candidate.config, plan))
    left = (time.monotonic() - start) / number * (len(chosen) - number)
    print(f"{count} {report.line(candidate.config, plan)}, {duration(left)} left", flush=True)
  compiled.sort(key=lambda pair: -pair[1].tokens_per_second if not pair[1].too_large else 0)
  print("\nbest first:\n" + "\n".join(report.line(*pair) for pair in compiled), flush=True)
  return [plan for _, plan in compiled]


def candidates(
  config: Config, name: str, slices: int, lengths: Sequence[int], segments: Sequence[int]
) -> list[Candidate]:
  """Every length and segment length on every mesh shape of a topology, ranked by estimated speed.

  The number of tokens in a step is kept: longer rows are fewer. Meshes whose axes do not divide the rows, heads or
  segments are left out. The axis "data" has the size `slices`. The best candidate of every length and segment length
  comes before the second best of any.
  """
  devices = topology.devices(name, slices)
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
  """All ordered factorisations of n into `parts` factors."""
  if parts == 1:
    yield (n,)
    return
  for first in (i for i in range(1, n + 1) if n % i == 0):
    for rest in _factors(n // first, parts - 1):
      yield (first, *rest)


def _guess(config: Config, sizes: dict[str, int], chip: chips.Chip) -> tuple[float, float]:
  """(seconds, bytes) from the few terms that differ most between meshes; good for ranking only."""
  model, data, parts = config.model, config.data, config.train.microbatches
  work = [kind.work(model, data.length, sizes["context"]) for kind in (*model.mixers, *model.feed_forwards)]
  parameters, flops, chained, gathers = (model.repeats * sum(numbers) for numbers in zip(*work, strict=True))
  parameters += model.vocab_size * model.d_model
  sharded = axes.shards("embed", sizes)
  rows = data.batch_size / parts / axes.shards("batch", sizes)
  residual = 2 * rows * data.length / sizes["context"] * model.d_model
  tokens = data.batch_size * data.length / math.prod(sizes.values())
  flops = (8 * parameters + flops + chained * (sizes["context"] + rows - 1) / rows) * tokens
  links = 2 * chip.link
  seconds = flops / chip.flops / 0.5
  seconds += 8 * parameters / sizes["model"] / (chip.axes * links) * (sharded > 1)
  seconds += 12 * model.layers * parts * residual * (sizes["model"] - 1) / sizes["model"] / links
  seconds += gathers * parts * residual * (sizes["context"] - 1) / sizes["model"] / links
  held = 12 * parameters / sharded / sizes["model"] + (model.layers + 16) * residual
  held += 10 * residual / model.d_model * model.vocab_size / sizes["model"] / 2
  return seconds, held + 3 * plans.cached_memories(config, sizes)
