"""Models of several kinds of layers, one of them written here: nothing else of the package knows of it."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from marks import slow
from quick_compile import jit

from mc_jax.data import windows
from mc_jax.errors import ConfigError
from mc_jax.inference import export
from mc_jax.inference.generation import Decoder
from mc_jax.models import CacheConfig, LanguageModel, MemoryConfig, ModelConfig, inspection, layer
from mc_jax.models import cache as cache_lib
from mc_jax.models.cache import LayerCache
from mc_jax.models.config import completed, from_stored
from mc_jax.models.linear import parameter
from mc_jax.models.norms import RMSNorm
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.planning import plans
from mc_jax.training import config as config_lib
from mc_jax.training import state, step

LENGTH = 16
HYBRID, TOY = ("memory", "attention"), ("moving_average", "attention")


class MovingAverage(layer.Mixer):
  """y_t = a y_{t-1} + (1 - a) x_t in each document, with a learned a for each channel; y scaled as all layers share."""

  endless = True

  def __init__(self, config, *, rngs):
    # A head's channels are apart, so that mesh.model splits them.
    shape = config.heads, config.head_dim
    self.decay = parameter(jax.nn.initializers.normal(1.0), shape, ("heads", "head_dim"), rngs)

  def __call__(self, x, context=layer.PLAIN, cache=None):
    a = jax.nn.sigmoid(self.decay[...]).reshape(-1)
    batch, length, _ = x.shape
    document = jnp.ones((batch, length), jnp.int32) if context.document is None else context.document
    new = document != jnp.pad(document, ((0, 0), (1, 0)))[:, :-1]
    before = jnp.zeros_like(x[:, 0]) if cache is None else cache.own
    if cache is not None:
      new = jnp.zeros_like(new)
    elif context.lengths is not None:  # what follows a prompt leaves the average as it is
      a, x = (
        jnp.where(jnp.arange(length)[:, None] < context.lengths[:, None, None], *both) for both in ((a, 1), (x, 0))
      )

    def read(y, token):
      x, a, new = token
      y = a * jnp.where(new[:, None], 0, y) + (1 - a) * x
      return y, y

    a = jnp.broadcast_to(a, x.shape)
    last, y = jax.lax.scan(read, before, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (x, a, new)))
    if context.active is not None:
      last = jnp.where(context.active[:, None], last, before)
    left = None if context.cache is None else LayerCache({}, jnp.zeros((), jnp.int32), last)
    return context.shared[self.name](jnp.moveaxis(y, 0, 1)), left

  def init_cache(self, config, batch):
    return LayerCache({}, jnp.zeros((), jnp.int32), jnp.zeros((batch, self.decay[...].size)))

  @classmethod
  def shared(cls, config, *, rngs):
    return RMSNorm({"embed": config.d_model}, rngs=rngs)

  @classmethod
  def mesh_problems(cls, config, length, sizes):
    return [] if sizes["model"] <= 2 else ["model.pattern with moving_average needs mesh.model of 1 or 2"]


@pytest.fixture(scope="module", autouse=True)
def registered():
  layer.register("moving_average")(MovingAverage)
  yield
  del layer.LAYERS["moving_average"]


def model_config(pattern, **fields):
  memory = MemoryConfig(rule="linear", chunk=4, segment_length=4)
  sizes = {"vocab_size": 32, "layers": 2, "d_model": 16, "heads": 2, "mlp_dim": 16, "remat": "none"}
  return ModelConfig(**(sizes | {"memory": memory} | fields), pattern=pattern)


@pytest.fixture
def run_config(tiny):
  def make(pattern, **fields):
    config = tiny(batch_size=8, warmup_steps=0, epsilon=1e-2, **fields)
    return dataclasses.replace(config, model=model_config(pattern, vocab_size=256))

  return make


def make(pattern, **fields):
  return nnx.split(LanguageModel(model_config(pattern, **fields), nnx.Rngs(0)))


def tokens(rows=2):
  return np.random.default_rng(0).integers(0, 32, (rows, LENGTH)).astype(np.int32)


def flat(params):
  return traverse_util.flatten_dict(params, sep="/")


def test_places_in_the_pattern_have_parameters_of_their_own():
  _, params = jax.eval_shape(lambda: make((*HYBRID, "memory"), layers=6))
  paths = flat(nnx.to_pure_dict(params))
  assert {path.split("/")[1] for path in paths if path.startswith("blocks/")} == {"0", "1", "2"}
  assert all(leaf.shape[0] == 2 for path, leaf in paths.items() if path.startswith("blocks/"))
  assert "blocks/0/mixer/projection/kernel" in paths and "blocks/1/mixer/query/kernel" in paths
  one = flat(nnx.to_pure_dict(jax.eval_shape(lambda: make(("attention", "attention"), layers=2))[1]))
  assert "blocks/1/mixer/query/kernel" in one


@pytest.mark.parametrize("pattern", [slow(HYBRID), TOY], ids="-".join)
def test_layers_are_run_in_the_patterns_order(pattern):
  """Two repeats of the pattern, rematerialised, are its layers one after the other."""
  config = model_config(pattern, layers=4, remat="full")
  model = LanguageModel(config, nnx.Rngs(0))
  ids = np.array([[1] * 5 + [2] * 9 + [0] * 2])

  @jit
  def loop(tokens):
    x, context = model.embed(tokens), model.context(document=jnp.asarray(ids))
    for i in range(config.layers):
      graph, layers = nnx.split(model.blocks[str(i % 2)])
      x, _ = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i // 2], layers))(x, context)
    return model.logits(x)

  chex.assert_trees_all_close(jit(model.__call__)(tokens(1), ids), loop(tokens(1)), atol=1e-5)


@pytest.mark.parametrize("pattern", [HYBRID, slow(TOY)], ids="-".join)
def test_it_decodes_what_it_computes(pattern):
  graph, params = make(pattern)
  config, lengths = CacheConfig(LENGTH), np.array([3, 9])

  @jit
  def both(params, tokens):
    model = nnx.merge(graph, params)
    first, cache = model.prefill(tokens, config, lengths)
    rows = jnp.arange(2)
    logits = jnp.zeros((2, LENGTH, 32)).at[rows, lengths - 1].set(first)

    def body(_, carry):
      logits, cache = carry
      active = cache.position < LENGTH
      at = jnp.where(active, cache.position, LENGTH)
      new, cache = model.step(tokens[rows, jnp.minimum(at, LENGTH - 1)], cache, config, active)
      return logits.at[rows, at].set(new, mode="drop"), cache

    return model(tokens), jax.lax.fori_loop(0, LENGTH - lengths.min(), body, (logits, cache))

  expected, (found, cache) = both(params, tokens())
  for row, length in enumerate(lengths):
    chex.assert_trees_all_close(found[row, length - 1 :], expected[row, length - 1 :], rtol=1e-4, atol=1e-4)
  assert len(cache.layers) == 2
  empty = jax.eval_shape(lambda params: nnx.merge(graph, params).init_cache(config, 2), params)
  chex.assert_trees_all_equal_shapes_and_dtypes(cache, empty)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [HYBRID, slow(TOY)], ids="-".join)
def test_it_trains_on_a_mesh_as_on_one_device(pattern, run_config):
  def a_step(config, devices):
    mesh = config.check().make_mesh(jax.devices()[:devices])
    random, shapes = np.random.default_rng(0), windows.shapes(config.data, mesh)
    batch = {name: random.integers(0, 256, x.shape).astype(x.dtype) for name, x in shapes.items()}
    with jax.set_mesh(mesh):
      current = state.create(config, mesh)
      before = jax.device_get(current.params)
      after, values = jit(step.train_step(config, mesh))(current, windows.place(batch, shapes))
    return before, jax.device_get((after.params, values)), current

  config = run_config(pattern)
  before, (expected, values), _ = a_step(config, 1)
  for path, moved in flat(jax.tree.map(lambda x, y: x != y, before, expected)).items():
    assert moved.any(), path
  mesh = MeshConfig(data=1, fsdp=2, context=2, model=2)
  begun, (after, on_mesh), current = a_step(dataclasses.replace(config, mesh=mesh), 8)
  chex.assert_trees_all_equal(begun, before)
  chex.assert_trees_all_close(after, expected, rtol=1e-3, atol=1e-5)
  assert on_mesh["loss"] == pytest.approx(values["loss"], rel=1e-5)
  first = jax.tree.leaves(current.params["blocks"]["0"]["mixer"])[0]
  assert first.addressable_shards[0].data.size < first.size


def test_it_is_exported_layer_by_layer(tmp_path):
  config = model_config((*HYBRID, "attention"), layers=6)
  params = nnx.to_pure_dict(nnx.state(LanguageModel(config, nnx.Rngs(0)), nnx.Param))
  export.save(tmp_path, config, params)
  names = export.tensors(config)
  of_layers = {int(name.split(".")[1]): name for name in names if name.endswith("mixer.query.kernel")}
  assert list(of_layers) == [1, 2, 4, 5]
  assert names[of_layers[4]].path == ("blocks", "1", "mixer", "query", "kernel") and names[of_layers[4]].index == 1
  again, loaded = export.load(tmp_path)
  assert again == config
  chex.assert_trees_all_equal(loaded, params)


def test_its_cache_is_planned(run_config):
  """All that grows is counted: states and summaries of memories, keys and values of attention."""
  config = run_config(HYBRID)
  planned = plans.cache_bytes(config)
  model = state.graph(config)
  params = jax.eval_shape(lambda: nnx.state(LanguageModel(config.model, nnx.Rngs(0))))
  cache = jax.eval_shape(lambda p: nnx.merge(model, p).init_cache(CacheConfig(LENGTH), 1), params)
  assert cache_lib.nbytes(cache.slots) == planned["sequence"] + planned["summaries"]
  attention = dataclasses.replace(config, model=model_config(("attention",), vocab_size=256))
  assert plans.cache_bytes(attention)["sequence"] == planned["kv_cache"] == 2 * 2 * LENGTH * 16 * 4
  sizes = dict(data=1, fsdp=1, context=1, model=1)
  alone = dataclasses.replace(config, model=model_config(("memory",), vocab_size=256))
  assert plans.cached_memories(config, sizes) == plans.cached_memories(alone, sizes) > 0


def test_memories_are_looked_at_in_the_order_of_their_layers():
  model = LanguageModel(model_config(("memory", "attention", "memory"), layers=6), nnx.Rngs(0))

  def norms(cached):
    return jnp.sqrt(sum(jnp.square(w).sum() for w in jax.tree.leaves(cached.states.memory)))

  @jit
  def both(tokens):
    x, found = model.embed(tokens), []
    for i in range(6):
      graph, layers = nnx.split(model.blocks[str(i % 3)])
      block = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i // 3], layers))
      x, norm = block(x, layer.Context(observe=norms))
      found += [] if norm is None else [norm]
    return inspection.look(model, tokens, None, norms), jnp.stack(found)

  looked, expected = both(tokens())
  assert looked.shape == (4,)
  chex.assert_trees_all_close(looked, expected, rtol=1e-5)


def test_sequences_end_with_the_layer_that_keeps_everything():
  """drop_oldest makes memories endless, and keys and values not."""
  for pattern, endless in (("memory", "moving_average"), True), (HYBRID, False):
    graph, params = jax.eval_shape(lambda pattern=pattern: make(pattern))
    decoder = Decoder(model_config(pattern), graph, params, CacheConfig(8, full="drop_oldest"))
    if endless:
      decoder._check([np.ones(12, int)], np.zeros(1), least=1)
    else:
      with pytest.raises(ConfigError, match=r"more than the 8 .*cache\.tokens"):
        decoder._check([np.ones(12, int)], np.zeros(1), least=1)


def test_what_each_layer_cannot_do_is_told_whatever_the_others_can():
  odd = model_config(HYBRID, d_model=12, heads=4)
  assert "multiple of 2 heads" in odd.problems()[0]
  logarithmic = model_config(HYBRID, memory=MemoryConfig(segmentation="logarithmic"))
  assert "cannot be decoded" in CacheConfig(8).problems(logarithmic)[0]
  sizes = dict(data=1, fsdp=1, context=2, model=1)
  assert "equally many segments" in logarithmic.mesh_problems(16, sizes)[0]
  assert "data.length=17 is not divisible by mesh.context=2" in model_config(HYBRID[1:]).mesh_problems(17, sizes)[0]
  assert "moving_average needs" in "".join(model_config(TOY).mesh_problems(16, sizes | {"model": 4}))


def test_a_pattern_divides_the_layers_and_names_what_there_is():
  (problem,) = model_config(HYBRID, layers=3, feed_forward=("swiglu",) * 3).problems()
  assert "model.layers=3 must be a multiple" in problem
  assert "model.pattern=memory,attention" in problem and "model.feed_forward=swiglu,swiglu,swiglu" in problem
  assert "use 6, 12, 18" in problem
  for field, value, valid in (
    ("pattern", (), "memory, attention, moving_average"),
    ("pattern", ("swiglu",), "memory, attention"),
    ("feed_forward", ("memory",), "swiglu"),
  ):
    (problem,) = dataclasses.replace(model_config(HYBRID), **{field: value}).problems()
    assert problem.startswith(f"model.{field}={','.join(value) or '()'} must be one or more of {valid}")


def test_a_name_is_registered_once_and_can_be_a_flag():
  with pytest.raises(ValueError, match="there is a layer 'memory' already: MemoryCaching"):
    layer.register("memory")
  with pytest.raises(ValueError, match="letters"):
    layer.register("a,b")


@pytest.mark.parametrize(
  "value", ["memory,attention", "(memory, attention)", ["memory", "attention"], ("memory,attention",)]
)
def test_a_pattern_may_be_a_text_or_a_list(value):
  config = ModelConfig(pattern=value)
  assert config.pattern == HYBRID
  assert ModelConfig(**(json.loads(json.dumps({"pattern": config.pattern})))) == config
  tree = config_lib.default()
  if not isinstance(value, str):
    tree.model.pattern = value
    assert config_lib.from_config_dict(tree).model.pattern == HYBRID


@pytest.mark.parametrize(("mixer", "pattern"), [("transformer", ("attention",)), ("memory_caching", ("memory",))])
def test_a_model_stored_with_a_mixer_is_read_and_a_flag_is_told_what_to_write(mixer, pattern):
  tree = dataclasses.asdict(model_config(pattern))
  old = {name: value for name, value in tree.items() if name not in ("pattern", "feed_forward", "attention")}
  old |= {"mixer": mixer, "rope_theta": 500.0}
  assert completed(old)["pattern"] == pattern
  config = config_lib.from_stored({"model": old}).model
  assert config == dataclasses.replace(model_config(pattern), attention=config.attention)
  assert config.attention.rope_theta == 500.0
  with pytest.raises(
    ConfigError, match=rf"model\.mixer any more; write model\.pattern \(.*'{mixer}' is pattern={pattern[0]}"
  ):
    config_lib.require_field("model.mixer")
  with pytest.raises(ConfigError, match=r"write model\.attention\.rope_theta"):
    config_lib.require_field("model.rope_theta")


def test_a_layer_without_a_cache_is_not_decoded(monkeypatch):
  monkeypatch.setattr(layer, "LAYERS", dict(layer.LAYERS))

  @layer.register("forgetful")
  class Forgetful(layer.Mixer):
    """It has no init_cache."""

  config = ModelConfig(layers=2, d_model=16, heads=2, vocab_size=16, pattern=("forgetful", "attention"))
  (problem,) = CacheConfig(8).problems(config)
  assert problem == "model.pattern has 'forgetful', which cannot be decoded: the layer has no init_cache"


@pytest.mark.parametrize(
  "field", [{"pattern": ["elsewhere"]}, {"memory": {"rule": "elsewhere"}}, {"memory": {"aggregation": "elsewhere"}}]
)
def test_a_stored_model_of_what_is_not_registered_here_is_told_in_a_line(field):
  with pytest.raises(ConfigError, match=r"elsewhere.*: import what registers it"):
    from_stored(field)
