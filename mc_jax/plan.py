"""Plans a run before TPUs are rented, by compiling its real training step for them on any machine.

  python -m mc_jax.plan --config=configs/titans_1b.py --topology=v5p:4x4x4 --config.model.memory.aggregation=ssc

prints HBM per chip against the chip's capacity, FLOPs, bytes over the interconnect, and the resulting step time, tokens
per second and model FLOPs utilisation. If the run does not fit, it exits with 1 and prints what needs the most memory.
Times are the compiler's estimate (mc_jax/planning/hlo_cost.py): nothing runs. --sweep tries mesh shapes, --lengths and
--segments, and prints what fits, best first. Requires the package libtpu, but no TPU.
"""

import importlib.metadata
import sys

import mc_jax.xla_flags  # noqa: F401  isort: skip  (before jax)
import jax
from absl import flags

from mc_jax import cli
from mc_jax.planning import plans, report, sweep
from mc_jax.training import config

CONFIG = cli.config_flag()
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPUs to plan for: v5e:16x16, v5p:4x4x4, v6e:4x4, ...")
_SLICES = flags.DEFINE_integer("slices", 1, "Number of slices, along mesh.data.", lower_bound=1)
_JSON = cli.json_flag()
_SWEEP = flags.DEFINE_boolean("sweep", False, "Try mesh shapes, --lengths and --segments.")
_LENGTHS = cli.numbers_flag("lengths", [], "--sweep: Values of data.length; the number of tokens per step is kept.")
_SEGMENTS = cli.numbers_flag("segments", [], "--sweep: Values of model.memory.segment_length.")
_MESHES = flags.DEFINE_integer("meshes", 3, "--sweep: Mesh shapes to compile for each length.", lower_bound=1)


def main(_: list[str]) -> None:
  """Plans as the flags say. Exits with 1 if the run does not fit; in a sweep, if nothing does."""
  jax.config.update("jax_platforms", "cpu")  # nothing runs: the machine's own accelerators are left alone
  run, topology = config.from_config_dict(CONFIG.value).check(), _TOPOLOGY.value
  if _SWEEP.value:
    planned = sweep.sweep(run, topology, _SLICES.value, _LENGTHS.value, _SEGMENTS.value, _MESHES.value)
  else:
    plan = plans.plan(run, topology, _SLICES.value, f"compiling the training step for {topology}")
    if plan.dense:
      steps = f", the first {plan.dense_steps:,} steps, which read all caches"
      print(report.table(plan.dense, steps), flush=True)
    print(report.table(plan), flush=True)
    planned = [plan]
  if _JSON.value:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    record = {"command": cli.command("plan"), "note": report.ESTIMATE, **versions}
    cli.write_json(_JSON.value, record | {"plans": [plan.to_json() for plan in planned]})
  if all(plan.too_large for plan in planned):
    sys.exit("\n".join(dict.fromkeys(plans.refusal(part) for plan in planned for part in plan.too_large)))


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "topology"])
  cli.run(main, CONFIG, hopeless=(OSError,))  # 1 is for a run that does not fit
