"""Loss and gradients of a model on meshes against those on one device: every rule, aggregation, carry and mesh axis.

  JAX_PLATFORMS=cpu python tests/parallel/sweep.py --json=docs/parallel/sweep.json

takes about half an hour of one core, nearly all of it tracing and compiling six programs for each combination; a run
that was stopped goes on from its file. 16 virtual devices, float32, documents that cross devices. Prints the largest
error of the loss and of any gradient, each relative to the largest number of the array, and exits with 1 if one is
above 1e-5.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
import time

import jax
import numpy as np
import tqdm
from flax import nnx

from mc_jax import memory, models
from mc_jax.data import windows
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.training import state, step
from mc_jax.training.config import Config

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import quick_compile

MESHES = {
  "data": MeshConfig(data=2),
  "fsdp": MeshConfig(data=1, fsdp=2),
  "model": MeshConfig(data=1, model=2),
  "context": MeshConfig(data=1, context=4),
  "all four": MeshConfig(data=2, fsdp=2, model=2, context=2),
}
TOLERANCE = 1e-5


def config_of(rule, aggregation, carry, mesh):
  """Two layers or one, two heads; segments of 4 tokens in chunks of 2."""
  # A rounding of the parameters, 1e-7, moves the gradients of two layers by 1e-5 to 5e-5 here, on one device too.
  layers = 1 if rule in ("linear", "swla") and aggregation in ("none", "residual") else 2
  config = Config(mesh=mesh)
  options = dict(rule=rule, aggregation=aggregation, carry=carry, segment_length=4, chunk=2, expansion=2)
  memory_config = dataclasses.replace(config.model.memory, **options)
  model = dict(layers=layers, d_model=16, heads=2, mlp_dim=16, vocab_size=256, memory=memory_config)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, **model),
    data=dataclasses.replace(config.data, batch_size=4, length=32, documents=True),
  )


def batch_of(config):
  """Random tokens in random documents."""
  random = np.random.default_rng(0)
  shape = config.data.batch_size, config.data.length
  return {
    "tokens": random.integers(0, 256, shape).astype(np.int32),
    "targets": random.integers(0, 256, shape).astype(np.int32),
    "weights": random.random(shape).astype(np.float32),
    "segment_ids": 1 + np.cumsum(random.random(shape) < 0.1, 1).astype(np.int32),
  }


def parameters(config):
  """The model's, at its seed."""

  def init():
    model = models.LanguageModel(config.model, rngs=nnx.Rngs(config.train.seed))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))

  return jax.device_get(quick_compile.jit(init)())


def gradients(config, params):
  """(loss, gradients) of the first step, fetched. params: of the model, on any mesh."""
  mesh = config.check().make_mesh(jax.devices()[: int(np.prod([abs(size) for size in _sizes(config.mesh)]))])
  graph = state.graph(config)
  params = jax.device_put(params, state.shardings(state.abstract(config, mesh).params))
  batch = windows.place(batch_of(config), windows.shapes(config.data, mesh))
  function = jax.value_and_grad(lambda params, batch: step.loss_sum(graph, params, batch))
  with jax.set_mesh(mesh):
    return jax.device_get(quick_compile.jit(function)(params, batch))


def _sizes(mesh):
  return mesh.data, mesh.fsdp, mesh.context, mesh.model


def error(found, expected):
  """The largest difference, relative to the largest number of each array."""
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  return float(np.max([np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in pairs]))


def compare(rule, aggregation, carry):
  """{mesh: error} of a combination."""
  combination = rule, aggregation, carry
  alone = config_of(*combination, MeshConfig(data=1))
  params = parameters(alone)
  expected = gradients(alone, params)
  return {name: error(gradients(config_of(*combination, mesh), params), expected) for name, mesh in MESHES.items()}


def read(path):
  """{combination: errors} of an earlier run, if it was made by the same JAX."""
  record = json.loads(path.read_text()) if path and path.exists() else {}
  rows = record["rows"] if record.get("jax") == jax.__version__ else []
  return {(row["rule"], row["aggregation"], row["carry"]): {name: row[name] for name in MESHES} for row in rows}


def write(path, errors):
  """The file, whole at any moment; errors to three digits."""
  path.parent.mkdir(parents=True, exist_ok=True)
  errors = {key: {name: float(f"{error:.3g}") for name, error in row.items()} for key, row in errors.items()}
  rows = [dict(zip(("rule", "aggregation", "carry"), key, strict=True), **row) for key, row in errors.items()]
  record = dict(jax=jax.__version__, tolerance=TOLERANCE, worst=worst(errors), rows=rows)
  part = path.with_suffix(".part")
  part.write_text(json.dumps(record) + "\n")
  part.replace(path)


def worst(errors):
  """{mesh: the largest error}."""
  return {name: float(np.max([row[name] for row in errors.values()])) for name in MESHES}


def main():
  """Runs the sweep, or what an earlier run left of it."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--json", type=pathlib.Path, help="Written as it goes; what it has already is not run again.")
  path = parser.parse_args().json
  jax.config.update("jax_num_cpu_devices", 16)
  errors = read(path)
  for combination in tqdm.tqdm(list(itertools.product(memory.RULES, memory.AGGREGATIONS, memory.CARRIES))):
    if combination not in errors:
      errors[combination] = compare(*combination)
      jax.clear_caches()
      if path:
        write(path, errors)
    row = errors[combination]
    tqdm.tqdm.write("{:7} {:9} {:12}".format(*combination) + "".join(f" {row[name]:8.1e}" for name in MESHES))
  largest = worst(errors)
  print("largest", " ".join(f"{name}: {value:.1e}" for name, value in largest.items()))
  return int(not all(value <= TOLERANCE for value in largest.values()))  # of NaN neither holds


if __name__ == "__main__":
  begin = time.monotonic()
  status = main()
  print(f"{time.monotonic() - begin:.0f} s")
  sys.exit(status)
