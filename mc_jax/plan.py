"""Tells what a run needs before TPUs are rented: compiles its real training step for them, with none there.

  python -m mc_jax.plan --config=configs/titans_1b.py --topology=v5p:4x4x4 --config.model.memory.aggregation=ssc

prints HBM per chip against the chip's capacity, FLOPs, bytes over the interconnect, and the step time, tokens per
second and model FLOPs utilisation that follow; exits with 1, naming what weighs most, if it does not fit. Times are the
compiler's estimate (mc_jax/parallel/hlo_cost.py): nothing runs. --sweep tries mesh shapes, and --lengths and
--segments, and prints what fits, best first. Needs the package libtpu, and no TPU.
"""

import importlib.metadata
import sys
import time

import mc_jax.xla_flags  # noqa: F401  isort: skip  (before jax)
import jax
from absl import flags

from mc_jax import cli
from mc_jax.errors import ConfigError
from mc_jax.training import config, planning, report, watchdog
from mc_jax.training.planning import Plan
from mc_jax.training.progress import duration

CONFIG = cli.config_flag()
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPUs: v5e:16x16, v5p:4x4x4, v6e:4x4, ...")
_SLICES = flags.DEFINE_integer("slices", 1, "So many of these slices, along mesh.data.", lower_bound=1)
_JSON = cli.json_flag()
_SWEEP = flags.DEFINE_boolean("sweep", False, "Try mesh shapes, --lengths and --segments.")
_LENGTHS = cli.numbers_flag("lengths", [], "--sweep: data.length, rows as many as keep a step's tokens.")
_SEGMENTS = cli.numbers_flag("segments", [], "--sweep: model.memory.segment_length.")
_MESHES = flags.DEFINE_integer("meshes", 3, "--sweep: mesh shapes, the most promising, of each length.", lower_bound=1)

ESTIMATE = "times are the compiler's estimate: nothing ran"


def main(_: list[str]) -> None:
  """Plans as the flags say. Exits with 1 if the run does not fit; of a sweep, if nothing does."""
  jax.config.update("jax_platforms", "cpu")  # nothing runs: the machine's own accelerators are left alone
  run = config.from_config_dict(CONFIG.value).check()
  if _SWEEP.value:
    plans = _sweep(run)
  else:
    plans = [_compile(run, f"compiling the training step for {_TOPOLOGY.value}")]
    if plans[0].dense:
      print(_report(plans[0].dense, f", the first {plans[0].dense_steps:,} steps, which read all caches"), flush=True)
    print(_report(plans[0]), flush=True)
  if _JSON.value:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    record = {"command": cli.command("plan"), "note": ESTIMATE, **versions}
    record["plans"] = [plan.to_json() for plan in plans]
    cli.write_json(_JSON.value, record)
  if all(plan.too_large for plan in plans):
    sys.exit("\n".join(dict.fromkeys(planning.refusal(part) for plan in plans for part in plan.too_large)))


def _report(plan: Plan, steps: str = "") -> str:
  """What a plan says, for people; of which steps, if not of all."""
  needed = sum(plan.hbm.values())
  rows = {
    "parameters": f"{plan.parameters:,}",
    "mesh": " ".join(f"{axis}={size}" for axis, size in plan.mesh.items()),
    "tokens a step": f"{plan.tokens:,}",
    "HBM of a chip": f"{planning.gib(needed)} of {planning.gib(plan.hbm_capacity)}, {needed / plan.hbm_capacity:.0%}",
    **{f"  {name}": planning.gib(size) for name, size in plan.hbm.items()},
  }
  if plan.cached_memories:
    rows["    cached memories"] = f"{planning.gib(plan.cached_memories)} a layer, among the temporaries"
  for name, text in {"checkpoint": "one cached memory", "sequence": "a sequence's cache"}.items():
    if name in plan.bytes_of:
      rows[text] = f"{plan.bytes_of[name] / 1e6:,.1f} MB, all layers"
  rows["a Transformer's KV cache"] = f"{plan.bytes_of['kv_cache'] / 1e6:,.1f} MB a sequence"
  if plan.fits:
    cost, seconds = plan.cost, plan.cost.time
    rows |= {
      "FLOPs of a chip": f"{cost.flops / 1e12:,.2f} T a step",
      "HBM traffic of a chip": f"{cost.hbm_bytes / 1e9:,.2f} GB a step",
      "sent by a chip": f"{sum(cost.collective_bytes.values()) / 1e9:,.2f} GB a step",
      **{f"  {kind}": f"{sent / 1e9:,.2f} GB" for kind, sent in sorted(cost.collective_bytes.items())},
      "step time": f"{_ms(seconds.step)} ({_ms(seconds.unhidden)} if no collective hides)",
      **{f"  {name}": _ms(s) for name, s in sorted(seconds.classes.items(), key=lambda item: -item[1])},
      "  collectives waited for": _ms(seconds.waited),
      "  collectives beside it": _ms(seconds.beside),
      "tokens per second": f"{plan.tokens_per_second:,.0f}, {plan.tokens_per_second / plan.chips:,.0f} a chip",
      "model FLOPs utilisation": f"{plan.utilisation:.1%}",
    }
    if cost.unknown_loops:
      rows["loops of unknown length"] = f"{len(cost.unknown_loops)}, taken for one round or half the caches"
    if cost.unestimated_kernels:
      rows["kernels of unknown FLOPs"] = ", ".join(cost.unestimated_kernels)
  rows["compiled in"] = duration(plan.compile_seconds)
  return report.table(rows, f"plan for {plan.topology}{steps} ({ESTIMATE})")


def _sweep(run: config.Config) -> list[Plan]:
  """Compiles the most promising candidates, and prints them as they come and best first."""
  lengths = _LENGTHS.value or [run.data.length]
  segments = _SEGMENTS.value or [run.model.memory.segment_length]
  found = planning.candidates(run, _TOPOLOGY.value, _SLICES.value, lengths, segments)
  found = found[: _MESHES.value * len(lengths) * len(segments)]
  if not found:
    raise ConfigError(f"no mesh of {_TOPOLOGY.value} divides the rows, heads and segments of this configuration")
  print(f"{len(found)} to compile, the most promising first ({ESTIMATE})", flush=True)
  plans, start = [], time.monotonic()
  for number, candidate in enumerate(found, 1):
    plans.append((candidate.config, _compile(candidate.config, f"compiling [{number}/{len(found)}]")))
    left = (time.monotonic() - start) / number * (len(found) - number)
    print(f"[{number}/{len(found)}] {_line(*plans[-1])}, {duration(left)} left", flush=True)
  plans.sort(key=lambda pair: -pair[1].tokens_per_second if not pair[1].too_large else 0)
  print("\nbest first:\n" + "\n".join(_line(*pair) for pair in plans), flush=True)
  return [plan for _, plan in plans]


def _line(run: config.Config, plan: Plan) -> str:
  mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
  segments = f" segments of {run.model.memory.segment_length}" if run.model.mixer == "memory_caching" else ""
  what = f"length {run.data.length}{segments}, {mesh or 'one chip'}"
  largest = max(plan.too_large, key=lambda part: sum(part.hbm.values()), default=plan)
  needed = sum(largest.hbm.values())
  if plan.too_large:
    return f"{what}: does not fit ({planning.gib(needed)} of {planning.gib(plan.hbm_capacity)})"
  return (
    f"{what}: {plan.tokens_per_second:,.0f} tokens/s, {_ms(plan.cost.time.step)}, "
    f"MFU {plan.utilisation:.1%}, {planning.gib(needed)}"
    + (f"; the first {plan.dense_steps:,} steps {_ms(plan.dense.cost.time.step)}" if plan.dense else "")
  )


def _ms(seconds: float) -> str:
  return f"{1e3 * seconds:,.{0 if seconds > 0.1 else 2}f} ms"


def _compile(run: config.Config, what: str) -> Plan:
  """The plan of a configuration; reports on standard error that it is being compiled."""
  print(f"{what} ... minutes for a large model", file=sys.stderr, flush=True)
  with watchdog.telling(what, file=sys.stderr):
    return planning.plan(run, _TOPOLOGY.value, _SLICES.value)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "topology"])
  cli.run(main, CONFIG, hopeless=(OSError,))  # 1 says that it does not fit
