"""Loss and gradients of a model on meshes against those on one device: every rule, aggregation, carry and mesh axis.

  JAX_PLATFORMS=cpu python tests/parallel/sweep.py --json=docs/parallel/sweep.json

takes hours on two cores; the tests beside it run each rule, aggregation and carry on one mesh. 16 virtual
devices, float32, documents that cross devices. Prints the largest error of the loss and of any gradient, each relative
to the largest number of the array, and exits with 1 if one is above 1e-5.
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

from mc_jax import memory
from mc_jax.data import windows
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.training import state, step
from mc_jax.training.config import Config

MESHES = {
  "data": MeshConfig(data=2),
  "fsdp": MeshConfig(data=1, fsdp=2),
  "model": MeshConfig(data=1, model=2),
  "context": MeshConfig(data=1, context=4),
  "all four": MeshConfig(data=2, fsdp=2, model=2, context=2),
}
TOLERANCE = 1e-5
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def config_of(rule, aggregation, carry, mesh):
  """One layer, two heads; segments of 4 tokens in chunks of 2."""
  config = Config(mesh=mesh)
  options = dict(rule=rule, aggregation=aggregation, carry=carry, segment_length=4, chunk=2, expansion=2)
  memory_config = dataclasses.replace(config.model.memory, **options)
  model = dict(layers=1, d_model=16, heads=2, mlp_dim=16, vocab_size=256, memory=memory_config)
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


def gradients(config, params):
  """(loss, gradients) of the first step, fetched. params: of the model, on any mesh."""
  mesh = config.check().make_mesh(jax.devices()[: int(np.prod([abs(size) for size in _sizes(config.mesh)]))])
  graph = state.graph(config)
  params = jax.device_put(params, state.shardings(state.abstract(config, mesh).params))
  batch = windows.place(batch_of(config), windows.shapes(config.data, mesh))
  function = jax.value_and_grad(lambda params, batch: step.loss_sum(graph, params, batch))
  with jax.set_mesh(mesh):
    return jax.device_get(jax.jit(function, compiler_options=QUICK_COMPILE)(params, batch))


def _sizes(mesh):
  return mesh.data, mesh.fsdp, mesh.context, mesh.model


def error(found, expected):
  """The largest difference, relative to the largest number of each array."""
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


def main():
  """Runs the sweep."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--json", type=pathlib.Path)
  path = parser.parse_args().json
  jax.config.update("jax_num_cpu_devices", 16)
  rows = []
  combinations = list(itertools.product(memory.RULES, memory.AGGREGATIONS, memory.CARRIES))
  for rule, aggregation, carry in tqdm.tqdm(combinations):
    alone = config_of(rule, aggregation, carry, MeshConfig(data=1))
    params = jax.device_get(state.create(alone, alone.make_mesh(jax.devices()[:1])).params)
    expected = gradients(alone, params)
    row = dict(rule=rule, aggregation=aggregation, carry=carry)
    for name, mesh in MESHES.items():
      row[name] = error(gradients(config_of(rule, aggregation, carry, mesh), params), expected)
    jax.clear_caches()
    rows.append(row)
    tqdm.tqdm.write(f"{rule:7} {aggregation:9} {carry:12}" + "".join(f" {row[name]:8.1e}" for name in MESHES))
  worst = {name: max(row[name] for row in rows) for name in MESHES}
  print("largest", " ".join(f"{name}: {value:.1e}" for name, value in worst.items()))
  if path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(jax=jax.__version__, tolerance=TOLERANCE, worst=worst, rows=rows), indent=1) + "\n")
  return int(max(worst.values()) > TOLERANCE)


if __name__ == "__main__":
  begin = time.monotonic()
  status = main()
  print(f"{time.monotonic() - begin:.0f} s")
  sys.exit(status)
