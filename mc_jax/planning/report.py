"""A plan in words: a table of its figures, or one line among those of a sweep."""

from __future__ import annotations

from mc_jax.planning.plans import Plan, gib
from mc_jax.training import report
from mc_jax.training.config import Config
from mc_jax.training.progress import duration

ESTIMATE = "times are the compiler's estimate: nothing ran"


def table(plan: Plan, steps: str = "") -> str:
  """The figures of a plan, one a line.

  Args:
    plan: The plan.
    steps: The steps it is for, to go into the title; "" for all.
  """
  needed = sum(plan.hbm.values())
  rows = {
    "parameters": f"{plan.parameters:,}",
    "mesh": " ".join(f"{axis}={size}" for axis, size in plan.mesh.items()),
    "tokens a step": f"{plan.tokens:,}",
    "HBM of a chip": f"{gib(needed)} of {gib(plan.hbm_capacity)}, {needed / plan.hbm_capacity:.0%}",
    **{f"  {name}": gib(size) for name, size in plan.hbm.items()},
  }
  if plan.cached_memories:
    rows["    cached memories"] = f"{gib(plan.cached_memories)} a layer, among the temporaries"
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


def line(run: Config, plan: Plan) -> str:
  """What distinguishes a plan of a sweep, and how fast it is."""
  mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
  segments = f" segments of {run.model.memory.segment_length}" if run.model.has_memories else ""
  what = f"length {run.data.length}{segments}, {mesh or 'one chip'}"
  largest = max(plan.too_large, key=lambda part: sum(part.hbm.values()), default=plan)
  needed = sum(largest.hbm.values())
  if plan.too_large:
    return f"{what}: does not fit ({gib(needed)} of {gib(plan.hbm_capacity)})"
  return (
    f"{what}: {plan.tokens_per_second:,.0f} tokens/s, {_ms(plan.cost.time.step)}, "
    f"MFU {plan.utilisation:.1%}, {gib(needed)}"
    + (f"; the first {plan.dense_steps:,} steps {_ms(plan.dense.cost.time.step)}" if plan.dense else "")
  )


def _ms(seconds: float) -> str:
  return f"{1e3 * seconds:,.{0 if seconds > 0.1 else 2}f} ms"
