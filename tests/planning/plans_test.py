"""Plans: a small model's end to end, what does not fit is refused, sweeps try the right things in the right order."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mc_jax.data import DataConfig
from mc_jax.errors import ConfigError
from mc_jax.models import LanguageModel, MemoryConfig, ModelConfig
from mc_jax.parallel import attention, chips
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.planning import hlo_cost, plans, sweep, topology
from mc_jax.training import state
from mc_jax.training.config import Config

pytest.importorskip("libtpu")
# What is compiled for a TPU that is not there can be put into the cache, but not taken out of it.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")

ROOT = pathlib.Path(__file__).parent.parent.parent
TPU = "v5e:2x2"
MODEL = ModelConfig(
  layers=1, d_model=64, heads=2, dtype="bfloat16", memory=MemoryConfig(rule="linear", chunk=16, segment_length=32)
)
SMALL = Config(model=MODEL, data=DataConfig(length=128, batch_size=8), mesh=MeshConfig(data=1, fsdp=2, model=2))


CONFIG = f"--config={ROOT / 'configs/quickstart.py'}"


def _plan(*arguments):
  command = [sys.executable, "-m", "mc_jax.plan", CONFIG, *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_small_plan_end_to_end(tmp_path):
  small = ("--config.model.memory.rule=linear", "--config.model.layers=1", "--config.mesh.data=1")
  result = _plan(*small, "--config.mesh.fsdp=4", f"--topology={TPU}", f"--json={tmp_path / 'plan.json'}")
  assert result.returncode == 0, result.stderr
  assert "compiler's estimate" in result.stdout
  for word in ("parameters", "optimiser state", "cached memories", "temporaries", "tokens per second", "all-"):
    assert word in result.stdout
  record = json.loads((tmp_path / "plan.json").read_text())
  assert f"--topology={TPU}" in record["command"]
  (plan,) = record["plans"]
  assert plan["fits"] and plan["mesh"] == {"data": 1, "fsdp": 4, "context": 1, "model": 1}
  assert 2 * plan["hbm"]["parameters"] == pytest.approx(plan["hbm"]["optimiser state"], rel=1e-3)
  assert plan["hbm"]["temporaries"] > 0
  assert plan["cost"]["flops"] > 0
  assert sum(plan["cost"]["collective_bytes"].values()) > 0
  seconds = plan["cost"]["time"]["step"]
  assert plan["tokens_per_second"] == pytest.approx(1024 / seconds)
  assert 0 < plan["model_flops_utilisation"] == pytest.approx(plan["model_flops"] / (seconds * 4 * 197e12))


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--topology=v5q:2x2", "v5e:2x2"),
    ("--config.model.layer=2", "model.layers"),
    ("--config.mesh.model=3", "mesh.model=3"),
  ],
)
def test_what_is_mistyped_is_one_line(door, flag, words):
  result = door("plan", CONFIG, f"--topology={TPU}", flag)
  assert result.returncode == 2
  assert words in result.stderr
  assert "Traceback" not in result.stderr


def test_what_does_not_fit_is_refused():
  large = ModelConfig(layers=1, d_model=16384, heads=128, dtype="bfloat16", pattern="attention")
  plan = plans.plan(dataclasses.replace(SMALL, model=large, mesh=MeshConfig()), TPU)
  assert not plan.fits
  assert plan.hbm["optimiser state"] > plan.hbm["parameters"] > 10e9
  message = plans.refusal(plan)
  assert message.index("optimiser state") < message.index("parameters")
  assert "16.00 GiB" in message


@pytest.mark.slow
def test_steps_that_read_all_caches_are_planned_besides():
  memory = dataclasses.replace(MODEL.memory, aggregation="ssc", top_k=1, dense_steps=10)
  plan = plans.plan(dataclasses.replace(SMALL, model=dataclasses.replace(MODEL, memory=memory)), TPU)
  assert plan.dense_steps == 10
  assert plan.dense.fits and "cached_read" in " ".join(plan.dense.cost.kernels)
  assert "selected_read" in " ".join(plan.cost.kernels)
  assert plan.to_json()["dense"]["tokens_per_second"] == plan.dense.tokens_per_second
  assert not plan.too_large
  large = dataclasses.replace(plan, dense=dataclasses.replace(plan.dense, fits=False))
  assert large.too_large == [large.dense]


def test_parameters_and_caches_are_what_a_chip_holds():
  devices = topology.devices(TPU, 1)
  on_mesh = state.abstract(SMALL, SMALL.make_mesh(devices))
  whole = 4 * state.parameter_count(on_mesh)
  assert whole / 4 <= plans.bytes_per_device(on_mesh.params) < whole / 3  # norms and the like are everywhere
  # One row's cache in this model: 4 segments x 2 heads x 32 x 32 float32; 8 rows on 2 x 2 devices.
  assert plans.cached_memories(SMALL, dict(data=1, fsdp=2, context=1, model=2)) == 4 * 4 * 2 * 32 * 32 * 8 / 4
  assert plans.cache_bytes(SMALL) == {
    "checkpoint": 2 * 2 * 32 * 32,
    "sequence": 4 * 2 * 2 * 32 * 32,
    "summaries": 4 * 64 * 4,
    "kv_cache": 2 * 2 * 128 * 64,
  }


def test_rates_of_kernels_are_those_of_the_width_that_each_runs_at():
  chip = chips.of(topology.devices(TPU, 1))
  model = dataclasses.replace(MODEL, d_model=256, heads=2, memory=dataclasses.replace(MODEL.memory, key_dim=256))
  narrow = dataclasses.replace(model, memory=MODEL.memory)
  for name in ("linear_write_fwd", "titans_write_bwd", "cached_read_fwd", "selected_read_bwd"):
    assert plans.kernel_rate(narrow, name, chip) == chips.kernel_rate(name, chip, 128)
    assert plans.kernel_rate(model, name, chip) == chips.kernel_rate(name, chip, 256)
  assert plans.kernel_rate(model, "splash_mha_fwd_residuals", chip) == chips.kernel_rate("splash_mha_fwd", chip, 128)


def test_a_sweep_keeps_tokens_and_leaves_out_what_does_not_divide():
  found = sweep.candidates(SMALL, TPU, 1, [128, 256], [32])
  assert {c.config.data.batch_size * c.config.data.length for c in found} == {8 * 128}
  assert [c.config.data.length for c in found[:2]] in ([128, 256], [256, 128])  # the best of each before a second
  meshes = {dataclasses.astuple(c.config.mesh) for c in found if c.config.data.length == 128}
  assert meshes == {(1, 4, 1, 1), (1, 2, 2, 1), (1, 2, 1, 2), (1, 1, 4, 1), (1, 1, 2, 2)}  # two heads: model is 1 or 2
  with pytest.raises(ConfigError, match=r"data\.length"):
    sweep.candidates(SMALL, TPU, 1, [0], [32])


@pytest.mark.slow
def test_scanned_layers_cost_what_unrolled_ones_do():
  """The step's loops are multiplied: within 5% of a program that has none."""
  layers = 3
  config = ModelConfig(vocab_size=256, layers=layers, d_model=512, heads=4, dtype="bfloat16", pattern="attention")
  model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
  graph, parameters = nnx.split(model)
  block_graph, stacked = nnx.split(model.blocks)
  blocks = [jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), stacked) for _ in range(layers)]
  tokens = jax.ShapeDtypeStruct((64, 2048), jnp.int32)  # so many that no layer's activations stay in VMEM

  def scanned(parameters, tokens):
    return nnx.merge(graph, parameters)(tokens).sum()

  def unrolled(parameters, tokens):
    parameters, blocks = parameters
    model = nnx.merge(graph, parameters)
    block = jax.checkpoint(lambda x, layer: nnx.merge(block_graph, layer)(x)[0])
    x = model.embed(tokens)
    for layer in blocks:
      x = block(x, layer)
    return model.logits(x).sum()

  def cost(f, *args):
    chip = topology.one_chip(TPU)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), args)
    with jax.set_mesh(chip.mesh):
      compiled = jax.jit(jax.grad(f)).lower(*args).compile()
    return hlo_cost.cost(compiled, kernel_flops=attention.kernel_flops)

  loop, flat = cost(scanned, parameters, tokens), cost(unrolled, (parameters, blocks), tokens)
  assert not loop.unknown_loops
  assert loop.flops == pytest.approx(flat.flops, rel=0.01)
  assert loop.hbm_bytes == pytest.approx(flat.hbm_bytes, rel=0.05)


def test_chips():
  v5e, v5p = (chips.of(topology.devices(name, 1)) for name in ("v5e:4x4", "v5p:4x4x4"))
  assert (v5e.name, v5e.hbm_bytes, v5p.flops) == ("v5e", 16 * chips.GIB, 459e12)
  assert chips.of(topology.devices("v4:2x2x1", 1)).flops == 275e12  # both cores are one device
  assert chips.of(topology.devices("tpu7x:2x2x1", 1)).flops == 2307e12 / 2  # and here each is one
  line, plane = [(i, 0) for i in range(4)], [(i, j) for i in range(4) for j in range(4)]
  assert v5e.ring(line, (4, 4)) == 50e9  # not closed: what goes round comes back
  assert v5e.ring(plane, (4, 4)) == 100e9
  assert v5e.ring([(i, 0) for i in range(16)], (16, 16)) == 100e9
  assert v5p.ring([(i, 0, 0) for i in range(4)], (4, 4, 4)) == 200e9
  assert chips.sent("all-reduce", 8.0, 8.0, 4) == 12.0
  assert chips.sent("all-gather", 2.0, 8.0, 4) == chips.sent("reduce-scatter", 8.0, 2.0, 4) == 6.0
