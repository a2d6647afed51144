"""Timed steps: they run in place, on caches as long as they should be; the bytes are those that the planner counts."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marks import slow

from mc_jax.bench import decode_steps
from mc_jax.data import DataConfig
from mc_jax.inference import Decoder
from mc_jax.models import CacheConfig, MemoryConfig, ModelConfig
from mc_jax.models.cache import nbytes
from mc_jax.planning import plans, topology
from mc_jax.training import state
from mc_jax.training.config import Config

# What is compiled for a TPU that is not there can be put into the cache, but not taken out of it.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")

ROOT = pathlib.Path(__file__).parent.parent.parent
MODELS = ("none", "ssc", "grm", "attention")


def config_of(length, *, batch=1, **options):
  memory = MemoryConfig(**({"chunk": 8, "segment_length": 16} | options.pop("memory", {})))
  model = ModelConfig(**({"layers": 4, "d_model": 32, "heads": 2, "mlp_dim": 16} | options), memory=memory)
  return Config(model=model, data=DataConfig(length=length, batch_size=batch))


def named(length, name):
  if name == "attention":
    return config_of(length, pattern=name)
  return config_of(length, memory={"aggregation": name})


def abstract_decoder(config, mesh, **cache):
  cache = CacheConfig(config.data.length, **cache)
  return Decoder(config.model, state.graph(config), state.abstract(config, mesh).params, cache, mesh)


def slots_of(decoder, batch=1):
  def init(params):
    return nnx.merge(decoder.graph, params).init_cache(decoder.cache, batch)

  (slots,) = jax.eval_shape(init, decoder.params).slots
  return slots


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
  "memory",
  [
    {"rule": "titans", "aggregation": "grm"},
    {"rule": "dla", "aggregation": "soup", "depth": 3, "expansion": 2},
    {"rule": "swla", "aggregation": "residual", "segment_length": 24},
    {"rule": "linear", "aggregation": "ssc"},
    {"rule": "titans", "aggregation": "none", "after_training": "moving_average"},
    {"rule": "linear", "aggregation": "none"},
  ],
  ids=str,
)
def test_cached_memories_are_what_the_planner_counts(memory, dtype, alone):
  config = config_of(200, memory=memory, dtype=dtype)
  planned = plans.cache_bytes(config)
  slots = slots_of(abstract_decoder(config, alone))
  assert nbytes(slots["memories"]) == planned["sequence"]
  assert nbytes(slots["summaries"]) == planned["summaries"]
  assert nbytes(slots_of(abstract_decoder(config, alone), batch=3)) == 3 * (planned["sequence"] + planned["summaries"])
  if memory["rule"] == "linear" and planned["sequence"]:  # 13 segments, 2 heads, 16 x 16 numbers, 4 layers
    assert planned["sequence"] == 13 * 2 * 16 * 16 * 4 * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_and_values_are_what_the_planner_counts(dtype, alone):
  config = config_of(200, dtype=dtype)
  transformer = dataclasses.replace(config, model=dataclasses.replace(config.model, pattern="attention"))
  size = nbytes(slots_of(abstract_decoder(transformer, alone)))
  assert size == plans.cache_bytes(transformer)["kv_cache"] == plans.cache_bytes(config)["kv_cache"]
  assert size == 2 * 4 * 200 * 32 * jnp.dtype(dtype).itemsize


def test_a_smaller_dtype_of_the_cache_is_smaller(alone):
  config = config_of(200)
  sequence = plans.cache_bytes(config)["sequence"]
  half = slots_of(abstract_decoder(config, alone, dtype="bfloat16"))["memories"]
  quarter = slots_of(abstract_decoder(config, alone, dtype="int8"))["memories"]
  assert nbytes(half) == sequence / 2
  scales = 13 * 4 * 2 * 2 * 4  # segments, layers, heads, matrices of a memory, bytes
  assert nbytes(quarter) == sequence / 4 + scales


@pytest.mark.parametrize("name", [slow("none"), slow("ssc"), "grm", "attention"])
def test_steps_are_in_place_and_end_the_context(name, alone):
  config = named(4096, name)
  decoder = dataclasses.replace(abstract_decoder(config, alone), params=state.create(config, alone).params)
  steps = decode_steps.compile_steps(decoder, 2)
  planned = plans.cache_bytes(config)
  slots = planned["kv_cache"] if name == "attention" else planned["sequence"] + planned["summaries"]
  assert steps.slot_bytes == 2 * slots
  assert steps.slot_bytes + steps.other_bytes == decode_steps.whole_cache_bytes(decoder, 2)
  if name != "none":
    assert steps.temporary_bytes < steps.slot_bytes / 2

  tokens = jnp.zeros((decode_steps.LONGEST, 2), jnp.int32)
  cache = steps.fill(decoder.params, jnp.int32(4090))
  slot = jax.tree.leaves(cache.slots[0])[0] if name != "none" else np.arange(2)
  assert len(np.unique(slot)) > 0.9 * slot.size
  cache, likeliest = steps.loop(decoder.params, cache, tokens, jnp.int32(6))
  np.testing.assert_array_equal(cache.position, 4096)
  positions = [x for x in jax.tree.leaves(cache.layers[0].own) if jnp.issubdtype(x.dtype, jnp.integer)]
  assert positions
  for position in positions:
    np.testing.assert_array_equal(position, 4096)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(cache))
  assert likeliest.shape == (2,)
  assert all(seconds > 0 and cpu >= 0 for seconds, cpu in steps.seconds(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS[1:])
def test_steps_on_tpus_are_in_place(name):
  pytest.importorskip("libtpu")
  config = config_of(8192, d_model=512, memory={"aggregation": name, "segment_length": 128})
  if name == "attention":
    config = config_of(8192, d_model=512, pattern=name)
  mesh = config.make_mesh(topology.devices("v5e:2x2")[:1])
  compiled, cache = decode_steps.compile_step(abstract_decoder(config, mesh), 2)
  memory, size = compiled.memory_analysis(), nbytes(cache.slots[0])
  assert memory.alias_size_in_bytes >= size > 2**27
  assert memory.temp_size_in_bytes < size / 4


CONFIG = f"--config={ROOT / 'configs/quickstart.py'}"


def _measure(*arguments):
  command = [sys.executable, "-m", "mc_jax.bench.decode", CONFIG, *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_door_measures(tmp_path):
  memory = ("--config.model.memory.segment_length=16", "--config.model.memory.chunk=8")
  small = ("--config.model.d_model=16", "--config.model.layers=1", *memory)
  files = (f"--json={tmp_path / 'decode.json'}", f"--plot={tmp_path / 'decode.png'}")
  flags = ("--contexts=64,512,32", "--models=attention,ssc", "--between=32,64", "--rounds=2", "--limit_gib=0.00005")
  result = _measure(*small, *files, *flags)
  assert result.returncode == 0, result.stderr
  record = json.loads((tmp_path / "decode.json").read_text())
  assert [(row["model"], row["context"]) for row in record["rows"]] == [
    *(("attention", 32), ("attention", 64)),
    *(("ssc", 32), ("ssc", 64)),
  ]
  assert result.stdout.count("left out at 512") == 2
  for row in record["rows"]:
    assert row["slot_bytes"] == row["planned_bytes"] > 0
    assert row["milliseconds"] == min(row["milliseconds_of_rounds"]) == pytest.approx(1e3 / row["tokens_per_second"])
    assert len(row["milliseconds_of_rounds"]) == 2
  slow, fast = record["rows"][1]["milliseconds"], record["rows"][0]["milliseconds"]
  assert record["growth"]["milliseconds"]["attention"] == pytest.approx(slow / fast)
  assert (tmp_path / "decode.png").stat().st_size > 1000


@pytest.mark.parametrize(
  ("flag", "words"),
  [("--models=ssc,lstm", "lstm must be among none"), ("--contexts=1k", "--contexts=1k: must be whole")],
)
def test_what_is_mistyped_is_one_line(door, flag, words):
  result = door("bench.decode", CONFIG, flag)
  assert result.returncode == 2
  assert words in result.stderr
  assert "Traceback" not in result.stderr
