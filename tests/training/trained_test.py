"""A checkpoint's model comes back alone, and what would make it another one is refused."""

import dataclasses
import shutil
import types

import chex
import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from mc_jax.data import datasets
from mc_jax.errors import ConfigError
from mc_jax.models import MemoryConfig
from mc_jax.models.attention import AttentionConfig
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.training import checkpointing, state, trained
from mc_jax.training.checkpointing import Checkpoints

MEMORY = MemoryConfig(rule="linear", aggregation="none", chunk=4, segment_length=8)


@pytest.fixture(scope="module")
def run(tiny, alone, tmp_path_factory):
  """(workdir, parameters of step 2), with checkpoints of steps 1 and 2 whose parameters differ."""
  workdir = epath.Path(tmp_path_factory.mktemp("run"))
  config = tiny(memory=MEMORY)
  first, batches = state.create(config, alone), datasets.load(config.data).batches(alone)
  second = dataclasses.replace(first, params=jax.tree.map(lambda x: x + 1, first.params))
  with Checkpoints(workdir, keep=2) as checkpoints:
    checkpoints.save(1, first, batches, config)
    checkpoints.save(2, second, batches, config)
  return workdir, first.params, second.params


def test_the_newest_checkpoint_or_the_one_asked_for(run, tiny):
  workdir, first, second = run
  newest, older = trained.load(workdir), trained.load(str(workdir), step=1)
  assert (newest.step, older.step) == (2, 1)
  assert newest.config == tiny(memory=MEMORY)
  chex.assert_trees_all_equal(newest.params, second)
  chex.assert_trees_all_equal(older.params, first)
  tokens = np.arange(16, dtype=np.int32)[None]
  chex.assert_tree_all_finite(nnx.merge(state.graph(older.config), older.params)(tokens))


def test_overrides_change_what_leaves_the_parameters_as_they_are(run):
  overrides = {
    "data.length": 32,
    "model.dtype": "bfloat16",
    "model.memory.aggregation": "residual",
    "model.memory.segment_length": 16,
    "model.memory.carry": "independent",
  }
  loaded = trained.load(run[0], overrides)
  fields = trained.config_lib.fields(loaded.config)
  assert {name: fields[name] for name in overrides} == overrides
  chex.assert_trees_all_equal(loaded.params, run[2])


def test_after_training_a_state_is_made_and_cached_each_training_length(run):
  def load(**options):
    overrides = {f"model.memory.{name}": value for name, value in options.items()}
    memory = trained.load(run[0], {"data.length": 64, **overrides}).config.model.memory
    return memory.segment_length, memory.carry

  assert load() == (8, "checkpoint")
  assert load(after_training="moving_average") == (16, "independent")
  assert load(after_training="grm", segment_length=4) == (4, "independent")
  assert load(after_training="grm", carry="checkpoint") == (16, "checkpoint")


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"model.layers": 2, "model.dtype": "bfloat16"}, r"with\n  --config\.model\.layers: 1 in the .*, 2 requested\n"),
    ({"model.memory.aggregation": "grm"}, r"model\.memory\.aggregation: 'none' in the checkpoint, 'grm' requested"),
    ({"model.memory.aggregation": "soup", "model.memory.agregation": "x"}, "nearest field is model.memory.aggregation"),
    ({"model.memory": "linear"}, r"model\.memory is a group; change its fields one by one: rule, chunk"),
    ({"data.length": 0}, r"data\.length"),
    ({"mesh.model": 8}, r"mesh\.model=8"),
  ],
)
def test_other_overrides_are_refused_by_name(run, overrides, message):
  with pytest.raises(ConfigError, match=message):
    trained.load(run[0], overrides)


def test_a_checkpoint_with_a_mixer_in_its_configuration_is_read(tiny, alone, tmp_path, monkeypatch):
  """As all had it before models had patterns."""

  def as_it_was(config):
    tree = dataclasses.asdict(config)
    del tree["model"]["pattern"], tree["model"]["feed_forward"]
    tree["model"] |= {"mixer": "transformer", **tree["model"].pop("attention")}
    return tree

  config = tiny(pattern="attention", attention=AttentionConfig(rope_theta=500.0))
  current, batches = state.create(config, alone), datasets.load(config.data).batches(alone)
  monkeypatch.setattr(checkpointing, "dataclasses", types.SimpleNamespace(asdict=as_it_was))
  with Checkpoints(epath.Path(tmp_path), keep=2) as checkpoints:
    checkpoints.save(1, current, batches, config)
    assert checkpoints.config(1)["model"]["mixer"] == "transformer"
  loaded = trained.load(tmp_path)
  assert loaded.config == config
  chex.assert_trees_all_equal(loaded.params, current.params)


def test_on_a_mesh(run):
  whole = trained.load(run[0])
  assert whole.mesh.size == 1
  for loaded in (
    trained.load(run[0], {"mesh.fsdp": 2, "mesh.model": 2}),
    trained.load(run[0], mesh=dataclasses.replace(whole.config, mesh=MeshConfig(model=2)).make_mesh(jax.devices()[:2])),
  ):
    assert state.shardings(loaded.params) == state.shardings(state.abstract(whole.config, loaded.mesh).params)
    assert loaded.mesh.size > 1
    chex.assert_trees_all_equal(jax.device_get(loaded.params), jax.device_get(whole.params))


def test_what_is_no_run_is_told_with_what_is_there(run, tmp_path):
  with pytest.raises(ConfigError, match="nowhere is not a folder"):
    trained.load(tmp_path / "nowhere")
  assert not (tmp_path / "nowhere").exists()
  with pytest.raises(ConfigError, match=r"no folder checkpoints/.*: it is empty"):
    trained.load(tmp_path)
  (tmp_path / "config.json").touch()
  with pytest.raises(ConfigError, match=r"it holds config\.json"):
    trained.load(tmp_path)
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(ConfigError, match="no complete checkpoint"):
    trained.load(tmp_path)
  with pytest.raises(ConfigError, match="no checkpoint of step 7: use one of 1, 2"):
    trained.load(run[0], step=7)


def test_a_damaged_checkpoint_is_not_used(run, tmp_path):
  shutil.copytree(run[0], tmp_path / "copy")
  newest = tmp_path / "copy" / "checkpoints" / "2"
  (newest / "config" / "metadata").write_text("{}")
  with pytest.raises(
    ConfigError, match=r"(?s)2 is damaged:.*config/metadata is not what.*there are those of step 1, 2"
  ):
    trained.load(tmp_path / "copy")
  assert trained.load(tmp_path / "copy", step=1).step == 1
  (newest / "SHA256SUMS").unlink()  # as if the run were still writing it
  assert trained.load(tmp_path / "copy").step == 1
