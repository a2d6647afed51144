"""Compares loss and gradients on meshes with those on one device: every rule, aggregation, carry and mesh axis.

  JAX_PLATFORMS=cpu python -m mc_jax.bench.meshes --json=docs/parallel/sweep.json

takes about half an hour on one core, nearly all of it for tracing and compiling six programs per combination. If it is
stopped, the same command resumes from the file. 16 virtual devices, float32, documents that cross devices. Prints the
largest error of the loss and of any gradient, each relative to the array's largest value, and exits with 1 if one
exceeds 1e-5.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import time

import mc_jax.xla_flags  # noqa: F401  isort: skip  (before jax)
import jax
import numpy as np
import tqdm
from flax import nnx

from mc_jax import cli, memory, models, storage
from mc_jax.data import windows
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.training import state, step
from mc_jax.training.config import Config

_JSON = cli.json_flag()

MESHES = {
  "data": MeshConfig(data=2),
  "fsdp": MeshConfig(data=1, fsdp=2),
  "model": MeshConfig(data=1, model=2),
  "context": MeshConfig(data=1, context=4),
  "all four": MeshConfig(data=2, fsdp=2, model=2, context=2),
}
TOLERANCE = 1e-5

# Each program runs once: without the optimiser it compiles in half the time, and differs only by rounding.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def config_of(rule, aggregation, carry, mesh):
  """A model of one or two layers and two heads; segments of 4 tokens in chunks of 2."""
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
  """The model's initial parameters."""

  def init():
    model = models.LanguageModel(config.model, rngs=nnx.Rngs(config.train.seed))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))

  return jax.device_get(_jit(init)())


def gradients(config, params):
  """(loss, gradients) of the first step as numpy arrays, for parameters on any mesh."""
  mesh = config.check().make_mesh(jax.devices()[: int(np.prod([abs(size) for size in _sizes(config.mesh)]))])
  graph = state.graph(config)
  params = jax.device_put(params, state.shardings(state.abstract(config, mesh).params))
  batch = windows.place(batch_of(config), windows.shapes(config.data, mesh))
  function = jax.value_and_grad(lambda params, batch: step.loss_sum(graph, params, batch))
  with jax.set_mesh(mesh):
    return jax.device_get(_jit(function)(params, batch))


def _sizes(mesh):
  return mesh.data, mesh.fsdp, mesh.context, mesh.model


def error(actual, expected):
  """The largest difference of two trees, relative to each array's largest value."""
  pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  return float(np.max([np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in pairs]))


def compare(rule, aggregation, carry):
  """{mesh: error} for a combination."""
  combination = rule, aggregation, carry
  alone = config_of(*combination, MeshConfig(data=1))
  params = parameters(alone)
  expected = gradients(alone, params)
  return {name: error(gradients(config_of(*combination, mesh), params), expected) for name, mesh in MESHES.items()}


def read(path):
  """{combination: errors} of an earlier run with the same version of JAX."""
  record = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
  rows = record["rows"] if record.get("jax") == jax.__version__ else []
  return {(row["rule"], row["aggregation"], row["carry"]): {name: row[name] for name in MESHES} for row in rows}


def write(path, errors):
  """Writes the file, which is complete at any moment; errors have three digits."""
  path.parent.mkdir(parents=True, exist_ok=True)
  errors = {key: {name: float(f"{error:.3g}") for name, error in row.items()} for key, row in errors.items()}
  rows = [dict(zip(("rule", "aggregation", "carry"), key, strict=True), **row) for key, row in errors.items()]
  record = dict(jax=jax.__version__, tolerance=TOLERANCE, worst=worst(errors), rows=rows)
  storage.write(path, json.dumps(record) + "\n")


def worst(errors):
  """{mesh: the largest error}."""
  return {name: float(np.max([row[name] for row in errors.values()])) for name in MESHES}


def main(_):
  """Runs the combinations that the file does not have, and prints the errors of all."""
  begin, path = time.monotonic(), pathlib.Path(_JSON.value) if _JSON.value else None
  jax.config.update("jax_num_cpu_devices", 16)
  errors = read(path)
  combinations = [
    names
    for names in itertools.product(memory.RULES, memory.AGGREGATIONS, memory.CARRIES)
    if memory.options.mixable(memory.rules.get(names[0]), names[1])
  ]
  for combination in tqdm.tqdm(combinations):
    if combination not in errors:
      errors[combination] = compare(*combination)
      jax.clear_caches()
      if path:
        write(path, errors)
    row = errors[combination]
    tqdm.tqdm.write("{:7} {:9} {:12}".format(*combination) + "".join(f" {row[name]:8.1e}" for name in MESHES))
  largest = worst(errors)
  print("largest", " ".join(f"{name}: {value:.1e}" for name, value in largest.items()))
  print(f"{time.monotonic() - begin:.0f} s")
  sys.exit(int(not all(value <= TOLERANCE for value in largest.values())))  # NaN is no success


if __name__ == "__main__":
  cli.run(main)
