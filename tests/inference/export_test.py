"""An exported model comes back as it was, under the names of docs/export.md, and nothing else is taken for one."""

import dataclasses
import json
import pathlib
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marks import slow
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from mc_jax.data import lock
from mc_jax.errors import ConfigError
from mc_jax.inference import export
from mc_jax.memory import rules
from mc_jax.models import LanguageModel, MemoryConfig, ModelConfig, layer
from mc_jax.models.attention import Attention
from mc_jax.models.norms import RMSNorm
from mc_jax.models.product_keys import ProductKeysConfig

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "export.md"
TITANS = MemoryConfig(rule="titans", chunk=4, segment_length=8, expansion=2)


def tiny(**fields) -> ModelConfig:
  sizes = {"vocab_size": 11, "layers": 3, "d_model": 8, "heads": 2, "mlp_dim": 12, "remat": "none", "memory": TITANS}
  return ModelConfig(**(sizes | fields))


VARIANTS = {
  "titans": tiny(),
  "depth": tiny(memory=MemoryConfig(rule="dla", chunk=4, segment_length=8, expansion=2, depth=3, norm=True)),
  "swla": tiny(memory=MemoryConfig(rule="swla", chunk=4, segment_length=8, aggregation="none")),
  "untied": tiny(tied_embeddings=False, memory=MemoryConfig(rule="linear", segment_length=8, gate="token")),
  "transformer": tiny(pattern="attention"),
  "values": tiny(
    feed_forward="product_keys", product_keys=ProductKeysConfig(codebook=4, heads=2, top_k=3, qk_norm=True, gate=True)
  ),
  "own_values": tiny(
    feed_forward="product_keys",
    product_keys=ProductKeysConfig(codebook=4, heads=2, top_k=3, value_dim=6, plus=False, shared=False),
  ),
} | {
  rule: tiny(memory=MemoryConfig(rule=rule, chunk=4, segment_length=8))
  for rule in ("mamba2", "gla", "gated_deltanet", "gdn2", "mlstm")
}


def make(config: ModelConfig) -> LanguageModel:
  """A model in which no two numbers of a parameter are alike, so that a permuted one is another."""
  graph, state = jax.eval_shape(lambda: nnx.split(LanguageModel(config, rngs=nnx.Rngs(0))))
  leaves, tree = jax.tree.flatten(state)
  random = np.random.default_rng(0)
  return nnx.merge(graph, jax.tree.unflatten(tree, [jnp.asarray(random.normal(size=x.shape), x.dtype) for x in leaves]))


def params_of(model: LanguageModel) -> dict:
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """(folder, params) of the variant titans."""
  params = params_of(make(VARIANTS["titans"]))
  folder = tmp_path_factory.mktemp("exported")
  export.save(folder, VARIANTS["titans"], params)
  return folder, params


@pytest.fixture
def copy(exported, tmp_path):
  """A folder to spoil."""
  return shutil.copytree(exported[0], tmp_path / "copy")


def test_two_exports_into_one_folder_do_not_mix(exported, tmp_path):
  out = tmp_path / "out"
  with lock.take(out, "", ""), pytest.raises(OSError, match="another process exports to"):
    export.save(out, VARIANTS["titans"], exported[1])
  assert not out.exists()
  out.mkdir()
  (out / lock.FILE).touch()  # of an export that was killed before it wrote anything
  export.save(out, VARIANTS["titans"], exported[1])
  assert {path.name for path in out.iterdir()} == {export.CONFIG, export.WEIGHTS}


@pytest.mark.parametrize("name", [slow("titans"), slow("untied"), "transformer"])
def test_float32_comes_back_bit_for_bit_and_so_do_the_logits(name, tmp_path):
  model = make(VARIANTS[name])
  export.save(tmp_path, VARIANTS[name], params_of(model))
  config, params = export.load(tmp_path)
  assert config == VARIANTS[name]
  chex.assert_trees_all_equal_structs(params, params_of(model))
  chex.assert_trees_all_equal(params, params_of(model))
  graph, before = nnx.split(model)
  again, after = nnx.split(export.load_model(tmp_path))
  assert again == graph
  logits = jax.jit(lambda state: nnx.merge(graph, state)(jnp.arange(20).reshape(2, 10) % 11))
  np.testing.assert_array_equal(logits(after), logits(before))


def test_bfloat16_is_half_the_bytes_and_the_nearest_number(exported, tmp_path):
  folder, params = exported
  (half,) = export.save(tmp_path / "half", VARIANTS["titans"], params, dtype="bfloat16")
  header = 8 + 120 * len(export.tensors(VARIANTS["titans"]))  # of names and places, in either
  assert half.stat().st_size < (folder / export.WEIGHTS).stat().st_size / 2 + header
  _, rounded = export.load(tmp_path / "half")
  chex.assert_trees_all_equal(rounded, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))
  chex.assert_trees_all_close(rounded, params, rtol=2**-8, atol=0)
  # Once rounded, nothing is lost by going on in float32.
  export.save(tmp_path / "again", VARIANTS["titans"], rounded, dtype="bfloat16")
  assert (tmp_path / "again" / export.WEIGHTS).read_bytes() == half.read_bytes()


def test_a_tensor_is_one_layer_inputs_first(exported):
  folder, params = exported
  tensors = load_file(folder / export.WEIGHTS)
  for i in range(3):
    np.testing.assert_array_equal(tensors[f"blocks.{i}.mlp.gate.kernel"], params["blocks"]["mlp"]["gate"]["kernel"][i])
  x = np.ones((5, 8), np.float32)
  assert (x @ tensors["blocks.0.mlp.up.kernel"] @ tensors["blocks.0.mlp.down.kernel"]).shape == (5, 8)
  assert {x.dtype for x in tensors.values()} == {np.dtype(np.float32)}


def test_an_array_that_does_not_lie_in_order_is_written_in_order(exported, tmp_path):
  folder, params = exported
  turned = jax.tree.map(lambda x: np.asfortranarray(x), params)
  export.save(tmp_path / "turned", VARIANTS["titans"], turned)
  assert (tmp_path / "turned" / export.WEIGHTS).read_bytes() == (folder / export.WEIGHTS).read_bytes()


def test_files_of_a_limited_size_and_an_index(exported, tmp_path):
  folder, params = exported
  limit = 2_000
  files = export.save(tmp_path / "many", VARIANTS["titans"], params, file_bytes=limit)
  assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
  index = json.loads((tmp_path / "many" / export.INDEX).read_text())
  there = {name: file.name for file in files for name in load_file(file)}
  assert index["weight_map"] == there
  tensors = load_file(folder / export.WEIGHTS)
  assert set(there) == set(tensors)
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
  for file in files:
    sizes = [x.nbytes for x in load_file(file).values()]
    assert sum(sizes) <= limit or len(sizes) == 1
  chex.assert_trees_all_equal(export.load(tmp_path / "many")[1], params)


@dataclasses.dataclass(frozen=True)
class Channels(rules.GradientRule):
  """A rule one of whose gates has a value per channel; only its parameters matter here."""

  @property
  def gates(self):
    return {"alpha": rules.Gate(per_channel=True), "eta": rules.Gate()}

  def gate_init(self, segment_length):
    return dict.fromkeys(self.gates, rules.GateInit(0.0))


def test_the_documented_names_are_those_of_all_models(monkeypatch):
  linear = rules.get("linear")
  fields = {field.name: getattr(linear, field.name) for field in dataclasses.fields(linear)}
  monkeypatch.setitem(rules._RULES, "channels", lambda: Channels(**fields))
  others = MemoryConfig(rule="channels", segment_length=8), MemoryConfig(rule="deltanet", learned_init=True)
  variants = [*VARIANTS.values(), *(tiny(memory=memory) for memory in others)]
  rows = re.findall(r"^\| `([\w.{}]+)` \| ([\w, ]+) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
  documented = {name: tuple(axes.split(", ")) for name, axes in rows}
  assert len(documented) == len(rows)
  found = {}
  for config in variants:
    for name, tensor in export.tensors(config).items():
      name = re.sub(r"(?<=\.initial\.)w\d+$", "w{n}", re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name))
      assert found.setdefault(name, tensor.axes) == tensor.axes
  assert documented == found


class Sharing(Attention):
  """Attention whose layers share a norm."""

  name = "sharing"

  @classmethod
  def shared(cls, config, *, rngs):
    return RMSNorm({"embed": config.d_model}, rngs=rngs)


@pytest.mark.parametrize("pattern", ["sharing", "sharing,attention"])
def test_what_layers_share_is_one_tensor_under_the_layers_name(pattern, monkeypatch):
  monkeypatch.setitem(layer.LAYERS, "sharing", Sharing)
  shared = {k: x for k, x in export.tensors(tiny(pattern=pattern, layers=2)).items() if not k.startswith("blocks.")}
  assert shared.pop("shared.sharing.scale") == (("shared", "sharing", "scale"), None, ("embed",), (8,))
  assert set(shared) == {"embedding", "norm.scale"}


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, exported):
  (tmp_path / "mine.txt").write_text("mine")
  with pytest.raises(ConfigError, match=r"is not empty, it holds mine\.txt"):
    export.save(tmp_path, VARIANTS["titans"], exported[1])
  assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
  with pytest.raises(ConfigError, match="is a file"):
    export.require_empty(tmp_path / "mine.txt")
  with pytest.raises(ConfigError, match="must be a folder of this machine"):
    export.require_empty("gs://bucket/model")


def test_whoever_may_read_the_config_may_read_the_tensors(exported):
  modes = {path.stat().st_mode for path in exported[0].iterdir()}
  assert len(modes) == 1


def test_what_cannot_be_written_is_an_error_of_the_system(tmp_path, exported, monkeypatch):
  def full(*_):
    raise SafetensorError("No space left on device")

  monkeypatch.setattr(export, "save_file", full)
  with pytest.raises(OSError, match=r"model\.safetensors cannot be written: No space left"):
    export.save(tmp_path / "new", VARIANTS["titans"], exported[1])
  with pytest.raises(ConfigError, match=r"has no config\.json"):
    export.load(tmp_path / "new")


def test_another_dtype_is_refused_before_anything_is_written(tmp_path, exported):
  with pytest.raises(ConfigError, match="dtype='float16' is not one of float32, bfloat16"):
    export.save(tmp_path / "new", VARIANTS["titans"], exported[1], dtype="float16")
  assert not (tmp_path / "new").exists()


def test_missing_unknown_and_misshaped_tensors_are_named(copy):
  tensors = load_file(copy / export.WEIGHTS)
  del tensors["blocks.1.mlp.up.kernel"]
  tensors["lm_head.weight"] = np.zeros((2, 2), np.float32)
  tensors["blocks.0.mlp.gate.kernel"] = np.ascontiguousarray(tensors["blocks.0.mlp.gate.kernel"].T)
  tensors["norm.scale"] = tensors["norm.scale"].astype(np.float64)
  save_file(tensors, copy / export.WEIGHTS)
  with pytest.raises(ConfigError) as error:
    export.load(copy)
  lines = str(error.value).splitlines()[1:]
  assert sorted(lines) == [
    "  blocks.0.mlp.gate.kernel is [12, 8] and must be [8, 12]: embed, mlp",
    "  missing: blocks.1.mlp.up.kernel",
    "  norm.scale is F64 and must be one of F32, BF16, F16",
    "  unknown: lm_head.weight",
  ]


def test_files_that_are_not_there_or_not_whole(copy, exported, tmp_path):
  with pytest.raises(ConfigError, match=r"has no config\.json: it must be a folder that mc_jax\.export has finished"):
    export.load(tmp_path / "nowhere")
  file = copy / export.WEIGHTS
  file.write_bytes(file.read_bytes()[:-4])
  with pytest.raises(ConfigError, match=r"model\.safetensors is not a whole safetensors file"):
    export.load(copy)
  file.unlink()
  with pytest.raises(ConfigError, match=r"model\.safetensors is missing"):
    export.load(copy)
  (copy / export.INDEX).write_text('{"weight_map": {"embedding": "../../other.safetensors"}}')
  with pytest.raises(ConfigError, match=r"copy/other\.safetensors is missing"):  # nothing outside the folder is read
    export.load(copy)
  (copy / export.INDEX).write_text('{"weights": {}}')
  with pytest.raises(ConfigError, match='has no "weight_map"'):
    export.load(copy)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"hidden_act": "gelu"}, "fields that do not exist: hidden_act; ModelConfig has vocab_size, layers"),
    ({"memory": {"slots": 3}}, r"fields that do not exist: memory\.slots; MemoryConfig has rule, chunk"),
    ({"memory": 3}, "memory must be an object of fields, got 3"),
    ({"layers": "three"}, "has a value of the wrong type"),
    ({"heads": 3}, "does not divide model.d_model=8"),
    ({"layers": 4}, r"missing: blocks\.3\."),
  ],
)
def test_a_config_that_cannot_be(copy, change, message):
  tree = json.loads((copy / export.CONFIG).read_text())
  (copy / export.CONFIG).write_text(json.dumps(tree | change))
  with pytest.raises(ConfigError, match=message):
    export.load(copy)


def test_a_config_that_is_not_json(copy):
  (copy / export.CONFIG).write_text("layers: 3")
  with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
    export.load(copy)
  (copy / export.CONFIG).write_text("[]")
  with pytest.raises(ConfigError, match="must hold a JSON object"):
    export.load(copy)


def test_half_precision_of_other_programs_is_read(copy, exported):
  tensors = load_file(copy / export.WEIGHTS)
  save_file({name: x.astype(np.float16) for name, x in tensors.items()}, copy / export.WEIGHTS)
  with safe_open(copy / export.WEIGHTS, framework="np") as file:
    assert file.get_slice("embedding").get_dtype() == "F16"
  _, params = export.load(copy)
  chex.assert_trees_all_equal(params, jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), exported[1]))
