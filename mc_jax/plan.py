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
from mc_jax.training import config, plan_report, planning, watchdog
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


def main(_: list[str]) -> None:
  """Plans as the flags say. Exits with 1 if the run does not fit; of a sweep, if nothing does."""
  jax.config.update("jax_platforms", "cpu")  # nothing runs: the machine's own accelerators are left alone
  run = config.from_config_dict(CONFIG.value).check()
  if _SWEEP.value:
    plans = _sweep(run)
  else:
    plan = _compile(run, f"compiling the training step for {_TOPOLOGY.value}")
    if plan.dense:
      steps = f", the first {plan.dense_steps:,} steps, which read all caches"
      print(plan_report.table(plan.dense, steps), flush=True)
    print(plan_report.table(plan), flush=True)
    plans = [plan]
  if _JSON.value:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    record = {"command": cli.command("plan"), "note": plan_report.ESTIMATE, **versions}
    record["plans"] = [plan.to_json() for plan in plans]
    cli.write_json(_JSON.value, record)
  if all(plan.too_large for plan in plans):
    sys.exit("\n".join(dict.fromkeys(planning.refusal(part) for plan in plans for part in plan.too_large)))


def _sweep(run: config.Config) -> list[Plan]:
  """Compiles the most promising candidates, and prints them as they come and best first."""
  lengths = _LENGTHS.value or [run.data.length]
  segments = _SEGMENTS.value or [run.model.memory.segment_length]
  found = planning.candidates(run, _TOPOLOGY.value, _SLICES.value, lengths, segments)
  found = found[: _MESHES.value * len(lengths) * len(segments)]
  if not found:
    raise ConfigError(f"no mesh of {_TOPOLOGY.value} divides the rows, heads and segments of this configuration")
  print(f"{len(found)} to compile, the most promising first ({plan_report.ESTIMATE})", flush=True)
  plans, start = [], time.monotonic()
  for number, candidate in enumerate(found, 1):
    plans.append((candidate.config, _compile(candidate.config, f"compiling [{number}/{len(found)}]")))
    left = (time.monotonic() - start) / number * (len(found) - number)
    print(f"[{number}/{len(found)}] {plan_report.line(*plans[-1])}, {duration(left)} left", flush=True)
  plans.sort(key=lambda pair: -pair[1].tokens_per_second if not pair[1].too_large else 0)
  print("\nbest first:\n" + "\n".join(plan_report.line(*pair) for pair in plans), flush=True)
  return [plan for _, plan in plans]


def _compile(run: config.Config, what: str) -> Plan:
  """The plan of a configuration; reports on standard error that it is being compiled."""
  print(f"{what} ... minutes for a large model", file=sys.stderr, flush=True)
  with watchdog.telling(what, file=sys.stderr):
    return planning.plan(run, _TOPOLOGY.value, _SLICES.value)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "topology"])
  cli.run(main, CONFIG, hopeless=(OSError,))  # 1 says that it does not fit
