"""Measures the training speed of one Memory Caching layer: tokens per second, forward and backward.

  python -m mc_jax.bench.layer --rules=linear,titans --aggregations=none,grm,ssc --lengths=1024,2048 --json=bench.json

times the mixer as in a model (projections, convolution, gates, memory, output), with gradients for all parameters and
the input: the median of --repeats calls, after one that compiles. Nothing else should run on the machine.

  python -m mc_jax.bench.layer --topology=v5e:2x2 --implementation=xla --rules=titans --aggregations=grm --lengths=8192

runs nothing: it compiles for the chips of a TPU topology, on any machine, and prints the bytes that the program moves,
its FLOPs, and the compiler's estimate of its time (mc_jax/planning/hlo_cost.py).
"""

import itertools
import platform
import statistics
import sys
import time

import mc_jax.xla_flags  # noqa: F401  isort: skip  (before jax)
import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from mc_jax import cli, memory
from mc_jax.errors import ConfigError
from mc_jax.models.config import MemoryConfig, ModelConfig
from mc_jax.models.memory_caching import MemoryCaching
from mc_jax.parallel import axes, mesh
from mc_jax.planning import hlo_cost, topology

_RULES = flags.DEFINE_list("rules", list(memory.rules.names()), "Memory rules to measure.")
_AGGREGATIONS = flags.DEFINE_list("aggregations", list(memory.AGGREGATIONS), "Aggregations to measure.")
_LENGTHS = cli.numbers_flag("lengths", [1024], "Sequence lengths in tokens.", least=1)
_CARRY = flags.DEFINE_enum("carry", "checkpoint", memory.CARRIES, "Initial state of a segment.")
_BATCH = flags.DEFINE_integer("batch", 1, "Number of sequences.", lower_bound=1)
_D_MODEL = flags.DEFINE_integer("d_model", 256, "Width of the layer.", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 4, "Number of heads.", lower_bound=1)
_CHUNK = flags.DEFINE_integer("chunk", 64, "Tokens per chunk.", lower_bound=1)
_SEGMENT = flags.DEFINE_integer("segment", 128, "Tokens per segment.", lower_bound=1)
_TOP_K = flags.DEFINE_integer("top_k", 2, "Number of caches that ssc reads.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
_IMPLEMENTATION = flags.DEFINE_enum("implementation", None, ["xla", "pallas"], "Default: the best for the platform.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Compile for this TPU (v5e:2x2, v5p:2x2x1, ...) instead of timing.")
_CONTEXT = flags.DEFINE_integer("context", 1, "With --topology: Chips that share the sequence.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Number of timed calls; the median is reported.", lower_bound=1)
_JSON = cli.json_flag()


def gradients(config: ModelConfig, length: int):
  """(the layer's gradients, jitted; its parameters; its input's shape)."""
  layer = MemoryCaching(config, rngs=nnx.Rngs(0))
  graph, parameters = nnx.split(layer)

  @jax.jit
  def gradients(parameters, x):
    def loss(parameters, x):
      return jnp.square(nnx.merge(graph, parameters)(x)[0].astype(jnp.float32)).mean()

    return jax.grad(loss, argnums=(0, 1))(parameters, x)

  return gradients, parameters, jax.ShapeDtypeStruct((_BATCH.value, length, config.d_model), jnp.dtype(config.dtype))


def measure(config: ModelConfig, length: int) -> dict[str, float]:
  """Times one layer's forward and backward pass; returns the median in milliseconds, and tokens per second."""
  run, parameters, x = gradients(config, length)
  x = jax.random.normal(jax.random.key(0), x.shape, x.dtype)
  jax.block_until_ready(run(parameters, x))
  seconds = []
  for _ in range(_REPEATS.value):
    start = time.perf_counter()
    jax.block_until_ready(run(parameters, x))
    seconds.append(time.perf_counter() - start)
  median = statistics.median(seconds)
  return {"tokens_per_second": _BATCH.value * length / median, "milliseconds": 1e3 * median}


def estimate(config: ModelConfig, length: int) -> dict[str, float]:
  """The cost per chip of one layer's forward and backward pass, compiled for --topology."""
  run, parameters, x = gradients(config, length)
  chips = topology.devices(_TOPOLOGY.value)[: _CONTEXT.value]
  on = mesh.make(mesh.MeshConfig(data=1, context=_CONTEXT.value), chips)

  def placed(x, names):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=axes.sharding(on, names))

  with jax.set_mesh(on):
    compiled = run.lower(jax.tree.map(lambda w: placed(w, ()), parameters), placed(x, axes.RESIDUAL)).compile()
  # XLA's cached reads loop over the caches a query has: half of them, averaged over a sequence.
  reads = (len(config.memory.build_segmentation().lengths(length)) - 1) / 2
  cost = hlo_cost.cost(compiled, unknown_trips=reads if config.memory.implementation == "xla" else 1, devices=chips)
  memory_bytes = compiled.memory_analysis().temp_size_in_bytes
  figures = {"hbm_gb": cost.hbm_bytes / 1e9, "tflop": cost.flops / 1e12, "temporaries_gb": memory_bytes / 1e9}
  return figures | {"sent_gb": sum(cost.collective_bytes.values()) / 1e9, "milliseconds": 1e3 * cost.time.step}


def _mixable(rule: str, aggregation: str) -> bool:
  return memory.options.mixable(memory.rules.get(rule), aggregation)


def main(_) -> None:
  """Measures every combination of the flags, prints a table, and writes JSON if --json is given."""
  combinations = list(itertools.product(_RULES.value, _AGGREGATIONS.value, _LENGTHS.value))
  apart = [c for c in combinations if c[0] in memory.RULES and c[1] in memory.AGGREGATIONS and not _mixable(*c[:2])]
  if len(apart) < len(combinations):  # alone, one is refused below, with the reason
    combinations = [c for c in combinations if c not in apart]
    for rule, aggregation in dict.fromkeys(c[:2] for c in apart):
      print(f"{rule} with {aggregation} does not go together and is left out")
  configs = []
  for rule, aggregation, _ in combinations:
    options = dict(rule=rule, aggregation=aggregation, chunk=_CHUNK.value, segment_length=_SEGMENT.value)
    options |= dict(carry=_CARRY.value, top_k=_TOP_K.value, implementation=_IMPLEMENTATION.value)
    config = ModelConfig(
      d_model=_D_MODEL.value, heads=_HEADS.value, dtype=_DTYPE.value, layers=1, memory=MemoryConfig(**options)
    )
    if problems := config.problems("bench"):
      raise ConfigError("\n".join(problems))
    configs.append(config)

  run = measure
  if _TOPOLOGY.value:
    run = estimate
    jax.config.update("jax_platforms", "cpu")  # nothing runs: the machine's own accelerators are left alone
  device = topology.devices(_TOPOLOGY.value)[0] if _TOPOLOGY.value else jax.devices()[0]
  print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}, {_CARRY.value} carry", end="")
  print(", compiled, not run" if _TOPOLOGY.value else f", {platform.machine()}")
  rows = []
  for (rule, aggregation, length), config in zip(combinations, configs, strict=True):
    figures = run(config, length)
    if not rows:
      print(f"{'rule':17} {'aggregation':12} {'length':>7}" + "".join(f" {name:>18}" for name in figures))
    rows.append({"rule": rule, "aggregation": aggregation, "length": length, **figures})
    print(f"{rule:17} {aggregation:12} {length:7}" + "".join(f" {x:18,.2f}" for x in figures.values()), flush=True)
  if _JSON.value:
    settings = {
      flag.name: flag.value for flag in flags.FLAGS.flags_by_module_dict()[sys.argv[0]] if flag.name != "json"
    }
    report = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__, "settings": settings}
    cli.write_json(_JSON.value, report | {"rows": rows})


if __name__ == "__main__":
  cli.run(main)
