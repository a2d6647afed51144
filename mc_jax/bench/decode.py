r"""Measures decoding speed and cache size at contexts up to 256k, for one model with several aggregations.

  python -m mc_jax.bench.decode --config=configs/quickstart.py --contexts=4096,65536 --models=none,ssc,grm,attention

prefills nothing: the cache holds noise and its position is set (decode_steps.py). In every round each model takes its
last steps at each context, so that other work on the machine affects all of them alike; the fastest loop is reported.
cpu_milliseconds count the time of this process's threads, which other processes disturb less. `grows` is the share of a
step's time beyond that at the model's shortest context. Parameters have the compute dtype: float32 ones would be
converted in every step outside a loop.

  python -m mc_jax.bench.decode --topology=v5p:2x2x1 --config=configs/titans_1b.py --config.mesh.data=4 \
    --config.mesh.fsdp=1 --batch=4 --contexts=4096,65536

runs nothing: it compiles one step for the chips of a TPU topology, on any machine, and prints the bytes that the step
moves and the compiler's estimate of its time (mc_jax/planning/hlo_cost.py).
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import os
import pathlib
import platform
import sys
from collections.abc import Sequence

import mc_jax.xla_flags  # noqa: F401  isort: skip  (before jax)
import jax
import matplotlib
from absl import flags

from mc_jax import cli, memory
from mc_jax.bench import decode_steps
from mc_jax.errors import ConfigError
from mc_jax.inference import Decoder
from mc_jax.models import CacheConfig
from mc_jax.models.attention import Attention
from mc_jax.models.memory_caching import MemoryCaching, capacity
from mc_jax.parallel import chips
from mc_jax.planning import hlo_cost, plans, topology
from mc_jax.training import config, state

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot

MODELS = (*memory.AGGREGATIONS, Attention.name)

CONFIG = cli.config_flag()
_CONTEXTS = cli.numbers_flag("contexts", [2**n for n in range(10, 19)], "Context lengths in tokens.", least=16)
_MODELS = flags.DEFINE_list("models", ["none", "ssc", "grm", Attention.name], f"Models: {', '.join(MODELS)}.")
_BATCH = flags.DEFINE_integer("batch", 1, "Number of sequences.", lower_bound=1)
_CACHE_DTYPE = flags.DEFINE_string(
  "cache_dtype", None, "Dtype of cached states: float32, bfloat16, int8; default: the model's."
)
_LIMIT = flags.DEFINE_float("limit_gib", None, "Skip models and contexts that need a larger cache, in GiB.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Number of times that each model is timed at each context.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 4, "Timed loops in a round.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 0.1, "Approximate duration of a loop of two or more steps.", lower_bound=0.0)
_BETWEEN = cli.numbers_flag("between", [4096, 65536], "Two contexts between which to report growth.", least=16)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Compile for this TPU (v5e:2x2, v5p:2x2x1, ...) instead of timing.")
_JSON = cli.json_flag()
_PLOT = cli.path_flag("plot", None, "Also plot the figures in this PNG.", written=True)


def main(_: list[str]) -> None:
  """Measures what the flags name, prints a table, and writes JSON and a plot if they are requested."""
  contexts = sorted(set(_CONTEXTS.value))
  between = sorted(set(_BETWEEN.value))
  if unknown := [name for name in _MODELS.value if name not in MODELS]:
    raise ConfigError(f"--models={','.join(unknown)} must be among {', '.join(MODELS)}")
  if _TOPOLOGY.value:
    jax.config.update("jax_platforms", "cpu")  # nothing runs: the machine's own accelerators are left alone
  run = config.from_config_dict(CONFIG.value).check()
  runs = {name: dataclasses.replace(run, model=_model(run.model, name)) for name in _MODELS.value}
  devices = topology.devices(_TOPOLOGY.value) if _TOPOLOGY.value else jax.devices()
  machine = {"device": devices[0].device_kind, "platform": devices[0].platform, "devices": len(devices)}
  machine |= {"machine": platform.machine(), "cores": os.cpu_count()}
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
  print(" ".join(f"{name} {value}" for name, value in (machine | versions).items()), flush=True)

  measure = _estimate if _TOPOLOGY.value else _measure
  rows = measure(runs, contexts, devices)
  print(_table(rows))
  growth = {}
  for field in ("milliseconds",) if _TOPOLOGY.value else ("milliseconds", "cpu_milliseconds"):
    times = {name: by for name, by in _times(rows, field).items() if set(between) <= set(by)}
    growth[field] = {name: by[between[1]] / by[between[0]] for name, by in times.items()}
    for name, ratio in growth[field].items():
      print(f"{name}: {field} of a step at {between[1]:,} are {ratio:.3f} of those at {between[0]:,}")
  if _JSON.value:
    record = {"command": cli.command("bench.decode"), **machine, **versions}
    record |= {"load": os.getloadavg(), "between": between, "growth": growth, "rows": rows}
    cli.write_json(_JSON.value, record)
  if _PLOT.value:
    _plot(pathlib.Path(_PLOT.value), rows)


def _model(model, name: str):
  """The model with this aggregation, or the Transformer of the same size."""
  if name == Attention.name:
    return dataclasses.replace(model, pattern=(name,))
  read = dataclasses.replace(model.memory, aggregation=name, after_training=None)
  return dataclasses.replace(model, pattern=(MemoryCaching.name,), memory=read)


def _measure(runs: dict[str, config.Config], contexts: Sequence[int], devices: Sequence[jax.Device]) -> list[dict]:
  """Times steps on this machine's devices."""
  models = {}
  for name, run in runs.items():
    mesh = run.make_mesh(devices)
    params = jax.tree.map(lambda x, dtype=run.model.dtype: x.astype(dtype), state.create(run, mesh).params)
    models[name] = run.model, state.graph(run), params, mesh
  steps, rows = {}, {}
  for context, (name, (model, graph, params, mesh)) in itertools.product(contexts, models.items()):
    decoder = Decoder(model, graph, params, _cache(context), mesh)
    if _too_large(decoder):
      continue
    print(f"compiling {name} at {context:,}", file=sys.stderr, flush=True)
    compiled = steps[name, context] = decode_steps.compile_steps(decoder, _BATCH.value)
    count = int(_SECONDS.value / min(compiled.seconds(2))[0])
    most = min((context - decode_steps.WARM) // _REPEATS.value, decode_steps.LONGEST)
    rows[name, context] = {
      **_row(name, runs[name], context, compiled.slot_bytes, compiled.other_bytes, compiled.temporary_bytes),
      "steps": min(max(2, count), most),
      "milliseconds_of_rounds": [],
      "cpu_milliseconds_of_rounds": [],
    }
  for i in range(_ROUNDS.value):
    print(f"round {i + 1} of {_ROUNDS.value}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    for key, row in rows.items():
      loops = zip(*steps[key].seconds(row["steps"], _REPEATS.value), strict=True)
      for field, seconds in zip(("milliseconds", "cpu_milliseconds"), loops, strict=True):
        row[f"{field}_of_rounds"].append(round(1e3 * min(seconds), 4))
        row[field] = min(row[f"{field}_of_rounds"])
  return _with_rates(list(rows.values()))


def _estimate(runs: dict[str, config.Config], contexts: Sequence[int], devices: Sequence[jax.Device]) -> list[dict]:
  """The compiler's estimates for a step; bytes are per chip."""
  rows = []
  for context, (name, run) in itertools.product(contexts, runs.items()):
    mesh = run.make_mesh(devices)
    params = jax.tree.map(functools.partial(_with_dtype, run.model.dtype), state.abstract(run, mesh).params)
    decoder = Decoder(run.model, state.graph(run), params, _cache(context), mesh)
    print(f"compiling {name} at {context:,}", file=sys.stderr, flush=True)
    try:
      compiled, cache = decode_steps.compile_step(decoder, _BATCH.value)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      print(f"{name} at {context:,} does not fit: {str(error).strip().splitlines()[0]}", flush=True)
      continue
    # The loop over cached states depends on the position: it is counted at its full length.
    cost = hlo_cost.cost(compiled, capacity(run.model, decoder.cache), devices=list(mesh.devices.flat))
    analysis = compiled.memory_analysis()
    slots = plans.bytes_per_device(cache.slots)
    figures = _row(name, run, context, slots, plans.bytes_per_device(cache) - slots, analysis.temp_size_in_bytes)
    figures |= {"parameter_bytes": plans.bytes_per_device(decoder.params), "hbm_bytes": cost.hbm_bytes}
    figures |= {"sent_bytes": sum(cost.collective_bytes.values()), "hbm_capacity": chips.of(devices).hbm_bytes}
    rows.append(figures | {"milliseconds": 1e3 * cost.time.step})
  return _with_rates(rows)


def _with_dtype(dtype: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)


def _cache(context: int) -> CacheConfig:
  return CacheConfig(context, dtype=_CACHE_DTYPE.value)


def _too_large(decoder: Decoder) -> bool:
  """Whether a cache exceeds --limit_gib; prints it if so."""
  size = decode_steps.whole_cache_bytes(decoder, _BATCH.value)
  if _LIMIT.value is None or size <= _LIMIT.value * chips.GIB:
    return False
  print(f"left out at {decoder.cache.tokens:,} tokens: a cache of {plans.gib(size)}", flush=True)
  return True


def _row(name: str, run: config.Config, context: int, slots: float, others: float, temporaries: float) -> dict:
  """A row's model, context and bytes; planned_bytes are those that the planner computes for the slots."""
  data = dataclasses.replace(run.data, length=context)
  planned = plans.cache_bytes(dataclasses.replace(run, data=data))
  planned = planned["sequence"] + planned.get("summaries", 0)
  row = {"model": name, "context": context, "slot_bytes": slots, "planned_bytes": _BATCH.value * planned}
  return row | {"other_cache_bytes": others, "temporary_bytes": temporaries}


def _with_rates(rows: list[dict]) -> list[dict]:
  """The rows, model by model, with the rates that follow from their milliseconds."""
  shortest = {name: next(iter(times.values())) for name, times in _times(rows).items()}
  for row in rows:
    row["tokens_per_second"] = 1e3 * _BATCH.value / row["milliseconds"]
    row["grows"] = 1 - shortest[row["model"]] / row["milliseconds"]
  return sorted(rows, key=lambda row: (list(shortest).index(row["model"]), row["context"]))


def _times(rows: list[dict], field: str = "milliseconds") -> dict[str, dict[int, float]]:
  """{model: {context: time of a step}}, in ascending order of contexts."""
  times = {}
  for row in sorted(rows, key=lambda row: row["context"]):
    times.setdefault(row["model"], {})[row["context"]] = row[field]
  return times


def _table(rows: list[dict]) -> str:
  heads = ("context", "tokens/s", "ms/step", "grows", "cache MB", "others MB", "temporaries MB")
  lines = [f"{'model':12}" + "".join(f"{head:>16}" for head in heads)]
  for row in rows:
    sizes = (row[name] / 1e6 for name in ("slot_bytes", "other_cache_bytes", "temporary_bytes"))
    cells = [f"{row['context']:,}", f"{row['tokens_per_second']:,.1f}", f"{row['milliseconds']:,.3f}"]
    cells += [f"{max(row['grows'], 0):.1%}", *(f"{size:,.2f}" for size in sizes)]
    lines.append(f"{row['model']:12}" + "".join(f"{cell:>16}" for cell in cells))
  return "\n".join(lines)


def _plot(path: pathlib.Path, rows: list[dict]) -> None:
  """Plots the time of a step and the cache's size against the context."""
  figure, panels = pyplot.subplots(1, 2, figsize=(10.4, 4.2), layout="constrained")
  for name in _times(rows):
    of_model = [row for row in rows if row["model"] == name]
    contexts = [row["context"] for row in of_model]
    sizes = [(row["slot_bytes"] + row["other_cache_bytes"]) / 1e6 for row in of_model]
    for axes, values in zip(panels, ([row["milliseconds"] for row in of_model], sizes), strict=True):
      axes.plot(contexts, values, "o-", markersize=3, linewidth=1.2, label=name)
  for axes, label in zip(panels, ("milliseconds a step", "MB of cache, including carried states"), strict=True):
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params("x", rotation=45)
    axes.set(xlabel="context, tokens", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
  figure.savefig(path, dpi=110)
  pyplot.close(figure)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  cli.run(main, CONFIG)
