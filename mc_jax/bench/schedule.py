"""Compiles a kernel for a TPU on any machine, and reads the compiler's own schedule.

    python -m mc_jax.bench.schedule titans_write_fwd --topology=v5e:2x2

compiles ahead of time, has the compiler dump its final schedule, and prints the number of VLIW bundles of each Pallas
kernel, how busy each unit is, and XLA's estimates for the rest. It is deterministic: two versions of a kernel can be
compared to the bundle. Requires the package libtpu, but no TPU.

The argument names a function of kernel_cases.py, or is FILE.py:NAME. The function takes no arguments and returns (fn,
args) or (fn, args, flops):
  fn     the function to compile
  args   a tuple of pytrees of jax.ShapeDtypeStruct; those without a `sharding` are placed on one chip
  flops  {kernel name: FLOPs of one grid step}, to print a kernel's rate, FLOPs per bundle, as a share of the rate of a
         plain large bfloat16 matmul kernel (1024 x 1024 x 512) in the same compiler for the same chip

Bundle counts are no run time: a loop inside a kernel counts once (so its rate means nothing; unroll it, or leave out
`flops`), and waiting for DMA or for a unit does not count. For a kernel bound by HBM, compare its bytes with the
bandwidth (`hbm`, from the compiler's cost analysis, which needs a pl.CostEstimate and counts XLA's loop bodies once).
"""

import importlib.util
import os
import pathlib
import re
import shutil
import tempfile

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import pallas as pl

from mc_jax import cli
from mc_jax.bench import kernel_cases
from mc_jax.errors import ConfigError
from mc_jax.parallel import chips
from mc_jax.planning import topology

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "TPU to compile for: v5e:2x2, v5p:2x2x1, v6e:4x4, ...")
_TOP = flags.DEFINE_integer("top", 12, "Number of XLA fusions to list, the costliest first.", lower_bound=0)
_KEEP = cli.path_flag("keep", None, "Folder in which to keep the compiler's dumps.")
_JSON = cli.json_flag()


def load(target: str):
  """What the function FILE.py:NAME, or NAME of kernel_cases.py, returns.

  Raises:
    ConfigError: There is no such file or function.
  """
  path, _, name = target.rpartition(":")
  module = kernel_cases
  if path:
    if not pathlib.Path(path).is_file():
      raise ConfigError(f"{target} must be FILE.py:NAME: there is no file {path}")
    spec = importlib.util.spec_from_file_location("schedule_target", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
  if not callable(getattr(module, name, None)):
    raise ConfigError(f"{path or 'kernel_cases.py'} has no function {name}: give one of it, or FILE.py:NAME")
  return getattr(module, name)()


def utilization(path: pathlib.Path) -> dict[str, float]:
  """Mean use of each unit's slots over the bundles, from the compiler's table."""
  names, capacity, rows, table = [], [], [], False
  for line in path.read_text(encoding="utf-8").splitlines():
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
  """Each Pallas kernel's final schedule, by the name of its instruction."""
  schedules = {}
  for path in sorted(dump.glob("*schedule-analysis_final_bundles.txt")):
    text = path.read_text(encoding="utf-8")
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
    schedules[name.group(1)] = entry
  return schedules


def plain_matmul():
  """The yardstick, one large bfloat16 product per grid step: (fn, args, FLOPs of a step)."""
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


def main(argv: list[str]) -> None:
  """Compiles the function that the command line names, and prints its schedule."""
  if len(argv) != 2:
    raise ConfigError("give one function: NAME of mc_jax/bench/kernel_cases.py, or FILE.py:NAME")
  dump = pathlib.Path(_KEEP.value or tempfile.mkdtemp(prefix="schedule_"))
  dump.mkdir(parents=True, exist_ok=True)
  jax.config.update("jax_platforms", "cpu")  # nothing runs
  # libtpu reads these when it is loaded, which may be as early as the shapes of a case are asked for.
  arguments = os.environ.get("LIBTPU_INIT_ARGS", "")
  os.environ["LIBTPU_INIT_ARGS"] = f"{arguments} --xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
  fn, fn_args, *rest = load(argv[1])
  flops = rest[0] if rest else {}
  devices, one_chip = topology.devices(_TOPOLOGY.value), topology.one_chip(_TOPOLOGY.value)

  def compiled(fn, args):
    def place(x):
      return x if x.sharding is not None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one_chip)

    return jax.jit(fn).lower(*jax.tree.map(place, args)).compile()

  program = compiled(fn, fn_args)
  cost, memory = program.cost_analysis(), program.memory_analysis()
  moved, seconds = cost.get("bytes accessed") or 0, cost.get("optimal_seconds") or 0
  schedules = kernels(dump)
  print(f"{_TOPOLOGY.value}: compiled for {devices[0].device_kind}")
  if flops:
    matmul, matmul_args, matmul_flops = plain_matmul()
    compiled(matmul, matmul_args)
    yardstick = matmul_flops / kernels(dump)["yardstick.1"]["bundles"]
  for name, entry in schedules.items():
    print(f"  kernel {name}: {entry['bundles']} bundles")
    if per_step := flops.get(name) or flops.get(name.split(".")[0]):
      entry["rate"] = round(per_step / entry["bundles"] / yardstick, 3)
      print(
        f"    {entry['rate']:.1%} of a plain matmul kernel's rate ({per_step / 1e6:.1f} MFLOP a step)"
        + ("  NOT VALID: is there a loop in the kernel, or are the FLOPs too many?" if entry["rate"] > 1 else "")
      )
    if entry.get("utilization"):
      print("    slots busy: " + "  ".join(f"{k} {v:.0%}" for k, v in entry["utilization"].items() if v >= 0.005))
  fusions = re.findall(r"%?([\w.\-]+) = [^\n]*?\"?estimated_cycles\"?:\"?(\d+)", program.as_text())
  for name, cycles in sorted(fusions, key=lambda pair: -int(pair[1]))[: _TOP.value]:
    print(f"  xla {name}: about {cycles} cycles a call")
  estimate = f"{seconds:.3e} s" if seconds > 0 else "none, a kernel has no pl.CostEstimate"
  print(f"  xla's own estimate of the whole call: {estimate}")
  print(f"  hbm: {moved / 1e6:.1f} MB moved, {moved / chips.of(devices).hbm_bandwidth:.2e} s at full bandwidth")
  print(
    f"  memory: arguments {memory.argument_size_in_bytes / 1e6:.1f} MB, outputs "
    f"{memory.output_size_in_bytes / 1e6:.1f} MB, temporaries {memory.temp_size_in_bytes / 1e6:.1f} MB"
  )
  figures = {"topology": _TOPOLOGY.value, "kernels": schedules, "xla_seconds": seconds, "flops": cost.get("flops")}
  figures |= {"bytes_accessed": moved, "temp_bytes": memory.temp_size_in_bytes}
  figures |= {"argument_bytes": memory.argument_size_in_bytes, "output_bytes": memory.output_size_in_bytes}
  cli.write_json(_JSON.value, figures)
  if not _KEEP.value:
    shutil.rmtree(dump, ignore_errors=True)


if __name__ == "__main__":
  cli.run(main, parse=cli.parse_arguments)
