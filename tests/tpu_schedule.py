#!/usr/bin/env python3
"""Compile a JAX function for a TPU that is not there, and read the compiler's own schedule.

libtpu (a PyPI package, `pip install libtpu`) holds the whole TPU compiler, and needs no TPU to compile. This
script compiles a function ahead of time for a TPU topology, asks the compiler to dump its final schedule, and
prints, for each Pallas kernel, how many VLIW bundles its program text has, how often each unit is busy, and how much
it spills. It is deterministic: two versions of a kernel can be compared to the bundle.

    python tests/tpu_schedule.py tests/tpu_cases.py:NAME [--topology v5e:2x2] [--top 12] [--json OUT]

NAME is a function of no arguments that returns (fn, args) or (fn, args, flops):
  fn     the function to compile (jit is added here)
  args   a tuple of jax.ShapeDtypeStruct, or pytrees of them; one with a `sharding` keeps it, the others are
         placed on one chip
  flops  optional dict {kernel name: FLOPs of ONE pass over its program text}, that is, of one grid step; gives
         the kernel's rate, FLOPs per bundle, as a share of what a plain large bf16 matmul kernel (1024 x 1024 x 512)
         reaches in the same compiler for the same chip

What the numbers are NOT: they are no run time. A bundle count is of the program text: a loop inside the kernel is
counted once, so such a kernel has no meaningful rate (unroll it, or score it without `flops`), and waiting for DMA
or for a unit is not counted. Where a kernel is bound by HBM, set its bytes against the bandwidth instead (printed
under `hbm`, from the compiler's cost analysis where a pl.CostEstimate was given; for XLA's own loops that analysis
counts the body once, whatever the trip count).
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile

# HBM bytes per second of one chip (public figures).
HBM = {"v4": 1.2e12, "v5e": 0.82e12, "v5p": 2.77e12, "v6e": 1.64e12, "tpu7x": 3.7e12}
ACCELERATOR_TYPE = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4", "tpu7x": "tpu7x-8"}


def prepare_environment(topology: str, dump: pathlib.Path) -> None:
  """Sets what libtpu reads when it is loaded: it must run before jax is imported."""
  chip = topology.split(":")[0]
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", ACCELERATOR_TYPE.get(chip, "v5litepod-4"))
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two of these at once would fight over a lock file
  os.environ["LIBTPU_INIT_ARGS"] = (
    os.environ.get("LIBTPU_INIT_ARGS", "") + f" --xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
  )


def load(target: str):
  path, _, name = target.partition(":")
  if not name:
    sys.exit("give FILE.py:NAME")
  spec = importlib.util.spec_from_file_location("tpu_schedule_target", path)
  module = importlib.util.module_from_spec(spec)
  sys.path.insert(0, os.getcwd())
  spec.loader.exec_module(module)
  return getattr(module, name)()


def utilization(path: pathlib.Path) -> dict[str, float]:
  """Mean use of each unit's slots over the bundles, from the compiler's per-bundle table."""
  names, capacity, rows, table = [], [], [], False
  for line in path.read_text().splitlines():
    if line.startswith(("MATMUL", "MXU")):  # the name depends on libtpu's version
      names = [n.strip() for n in line.split(",")]
    elif names and not capacity:
      capacity = [int(x) for x in line.split()]
    elif line.startswith("== UTILIZATION"):
      table = True
    elif table and line.strip():
      rows.append([int(x) for x in line.split()])
  if not rows:
    return {}
  return {n: round(sum(r[i] for r in rows) / (len(rows) * capacity[i]), 3) for i, n in enumerate(names)}


def kernels(dump: pathlib.Path) -> dict[str, dict]:
  """Each Pallas kernel's final schedule, by the kernel's instruction name."""
  found = {}
  for path in sorted(dump.glob("*schedule-analysis_final_bundles.txt")):
    text = path.read_text()
    if "tpu_custom_call" not in text:
      continue
    name = re.search(r"\d+-(.*?)-\d+-schedule-analysis", path.name)
    bundles = re.search(r"non empty scheduled bundles:\s*(\d+)", text)
    if not name or not bundles or name.group(1).startswith("TLP"):  # TLP: the program around the kernels
      continue
    entry = dict(bundles=int(bundles.group(1)))
    tables = list(dump.glob(f"{path.name.split('-')[0]}-{name.group(1)}-*final_hlo-static-per-bundle-utilization.txt"))
    if tables:
      entry["utilization"] = utilization(tables[-1])
    found[name.group(1)] = entry
  return found


def plain_matmul():
  """The yardstick: one large bf16 product a grid step. Returns (fn, args, FLOPs of a step)."""
  import jax
  import jax.numpy as jnp
  from jax.experimental import pallas as pl

  m, k, n = 1024, 1024, 512

  def kernel(x_ref, w_ref, o_ref):
    o_ref[...] = jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32)

  def plain_matmul_kernel(x, w):
    return pl.pallas_call(
      kernel,
      grid=(4,),
      out_shape=jax.ShapeDtypeStruct((4 * m, n), jnp.float32),
      name="yardstick",
      in_specs=[pl.BlockSpec((m, k), lambda i: (i, 0)), pl.BlockSpec((k, n), lambda i: (0, 0))],
      out_specs=pl.BlockSpec((m, n), lambda i: (i, 0)),
    )(x, w)

  def shape(*s):
    return jax.ShapeDtypeStruct(s, jnp.bfloat16)

  return plain_matmul_kernel, (shape(4 * m, k), shape(k, n)), 2 * m * k * n


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("target", help="FILE.py:NAME")
  parser.add_argument("--topology", default="v5e:2x2", help="for example v5e:2x2, v5p:2x2x1, v6e:4x4, tpu7x:2x2x1")
  parser.add_argument("--top", type=int, default=12, help="how many XLA fusions to list, the costliest first")
  parser.add_argument("--json", help="write the figures to this file too")
  parser.add_argument("--keep", help="keep the compiler's dumps in this folder")
  args = parser.parse_args()

  dump = pathlib.Path(args.keep or tempfile.mkdtemp(prefix="tpu_schedule_"))
  dump.mkdir(parents=True, exist_ok=True)
  prepare_environment(args.topology, dump)

  import jax
  import numpy as np
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(args.topology, "tpu")
  mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("chip",))
  one_chip = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  fn, fn_args, *rest = load(args.target)
  flops = rest[0] if rest else {}

  def place(x):
    return x if getattr(x, "sharding", None) is not None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one_chip)

  compiled = jax.jit(fn).lower(*jax.tree.map(place, fn_args)).compile()
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  hbm = HBM.get(args.topology.split(":")[0])
  report = dict(
    topology=args.topology,
    kernels=kernels(dump),
    xla_seconds=cost.get("optimal_seconds"),
    flops=cost.get("flops"),
    bytes_accessed=cost.get("bytes accessed"),
    temp_bytes=memory.temp_size_in_bytes,
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
  )
  print(f"{args.topology}: compiled for {topology.devices[0].device_kind}")
  yardstick = None
  if flops:
    yard_fn, yard_args, yard_flops = plain_matmul()
    jax.jit(yard_fn).lower(*jax.tree.map(place, yard_args)).compile()
    yardstick = yard_flops / kernels(dump)["yardstick.1"]["bundles"]
  for name, entry in report["kernels"].items():
    print(f"  kernel {name}: {entry['bundles']} bundles")
    per_step = flops.get(name) or flops.get(name.split(".")[0])
    if per_step:
      entry["rate"] = round(per_step / entry["bundles"] / yardstick, 3)
      print(
        f"    {entry['rate']:.1%} of a plain matmul kernel's rate ({per_step / 1e6:.1f} MFLOP a step)"
        + ("  NOT VALID: is there a loop in the kernel, or are the FLOPs too many?" if entry["rate"] > 1 else "")
      )
    if entry.get("utilization"):
      print("    slots busy: " + "  ".join(f"{k} {v:.0%}" for k, v in entry["utilization"].items() if v >= 0.005))
  fusions = [
    (int(c), n) for n, c in re.findall(r"%?([\w.\-]+) = [^\n]*?\"?estimated_cycles\"?:\"?(\d+)", compiled.as_text())
  ]
  for cycles, name in sorted(fusions, reverse=True)[: args.top]:
    print(f"  xla {name}: about {cycles} cycles a call")
  if (report["xla_seconds"] or 0) > 0:
    print(f"  xla's own estimate of the whole call: {report['xla_seconds']:.3e} s")
  else:
    print("  xla's own estimate of the whole call: none, a kernel has no pl.CostEstimate")
  print(
    f"  hbm: {(report['bytes_accessed'] or 0) / 1e6:.1f} MB moved"
    + (f", {(report['bytes_accessed'] or 0) / hbm:.2e} s at full bandwidth" if hbm else "")
  )
  print(
    f"  memory: arguments {report['argument_bytes'] / 1e6:.1f} MB, outputs {report['output_bytes'] / 1e6:.1f} MB, "
    f"temporaries {report['temp_bytes'] / 1e6:.1f} MB"
  )
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(report, indent=1))
  if not args.keep:
    shutil.rmtree(dump, ignore_errors=True)


if __name__ == "__main__":
  main()
