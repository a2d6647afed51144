"""Memory layers: the lookup against all n * n keys, the layer against its formula, models and meshes that have some."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from marks import slow
from quick_compile import jit

from mc_jax.errors import ConfigError
from mc_jax.inference import export
from mc_jax.models import CacheConfig, LanguageModel, MemoryConfig, ModelConfig, inspection, product_keys
from mc_jax.models.product_keys import ProductKeysConfig
from mc_jax.training import state, step

SMALL = ProductKeysConfig(codebook=8, heads=2, top_k=4, key_dim=6)


def brute_force(queries, codebooks, k):
  """Weights and rows of all n * n keys, sorted; every array is numpy's, queries [tokens, heads, key_dim]."""
  half = queries.shape[-1] // 2
  first = np.einsum("thd,hnd->thn", queries[..., :half], codebooks[:, 0])
  second = np.einsum("thd,hnd->thn", queries[..., half:], codebooks[:, 1])
  scores = (first[..., :, None] + second[..., None, :]).reshape(*queries.shape[:2], -1)
  order = np.lexsort((np.broadcast_to(np.arange(scores.shape[-1]), scores.shape), -scores), axis=-1)[..., :k]
  best = np.take_along_axis(scores, order, -1)
  weights = np.exp(best - best.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True), order


@pytest.mark.parametrize(
  ("n", "k", "values"),
  [
    (9, 1, "any"),
    (9, 9, "any"),
    (16, 32, "any"),  # more than a codebook has
    (3, 9, "any"),  # all there are
    (64, 32, "any"),
    (8, 5, "integers"),  # that tie
    (7, 20, "integers"),
    (4, 6, "zeros"),  # of both signs
  ],
)
def test_lookup_is_that_of_all_keys(float64, n, k, values):
  rng = np.random.default_rng(n * k)
  queries, codebooks = rng.normal(size=(500, 2, 6)), rng.normal(size=(2, 2, n, 3))
  if values == "integers":
    queries, codebooks = np.round(queries), np.round(codebooks)
  elif values == "zeros":
    queries = queries * 0.0
  weights, rows = jit(functools.partial(product_keys.lookup, top_k=k))(queries, codebooks)
  expected, expected_rows = brute_force(queries, codebooks, k)
  np.testing.assert_array_equal(rows, expected_rows)
  np.testing.assert_allclose(weights, expected, atol=1e-14)
  assert rows.dtype == jnp.int32


def test_lookup_has_the_gradients_of_all_keys_scores(float64):
  rng = np.random.default_rng(0)
  queries, codebooks, cotangent = (
    rng.normal(size=(40, 2, 6)),
    rng.normal(size=(2, 2, 8, 3)),
    rng.normal(size=(40, 2, 5)),
  )
  _, rows = brute_force(queries, codebooks, 5)

  def dense(queries, codebooks):
    first = jnp.einsum("thd,hnd->thn", queries[..., :3], codebooks[:, 0])
    second = jnp.einsum("thd,hnd->thn", queries[..., 3:], codebooks[:, 1])
    scores = (first[..., :, None] + second[..., None, :]).reshape(40, 2, -1)
    return jnp.sum(cotangent * jax.nn.softmax(jnp.take_along_axis(scores, rows, -1)))

  def sparse(queries, codebooks):
    return jnp.sum(cotangent * product_keys.lookup(queries, codebooks, 5)[0])

  for got, expected in zip(*(jit(jax.grad(f, (0, 1)))(queries, codebooks) for f in (sparse, dense)), strict=True):
    np.testing.assert_allclose(got, expected, atol=1e-13)


def test_lookup_of_bfloat16_and_of_any_leading_shape():
  rng = np.random.default_rng(0)
  queries = jnp.asarray(rng.normal(size=(2, 3, 2, 6)), jnp.bfloat16)
  codebooks = jnp.asarray(rng.normal(size=(2, 2, 8, 3)), jnp.bfloat16)
  weights, rows = product_keys.lookup(queries, codebooks, 4)
  assert weights.shape == rows.shape == (2, 3, 2, 4)
  assert weights.dtype == jnp.float32
  one_by_one = product_keys.lookup(queries.reshape(6, 2, 6), codebooks, 4)
  np.testing.assert_array_equal(rows.reshape(6, 2, 4), one_by_one[1])


@pytest.mark.parametrize(
  ("queries", "codebooks", "k", "words"),
  [
    ((5, 2, 7), (2, 2, 8, 3), 4, "key_dim must be even"),
    ((5, 2, 6), (2, 2, 8, 4), 4, r"need codebooks .* = \(2, 2, n, 3\), got \(2, 2, 8, 4\)"),
    ((5, 2, 6), (3, 2, 8, 3), 4, "need codebooks"),
    ((5, 2, 6), (2, 2, 8, 3), 65, "from 1 to the 64 rows of two codebooks of 8 keys, got 65"),
    ((5, 2, 6), (2, 2, 8, 3), 0, "got 0"),
    ((5, 2, 6), (2, 2, 46341, 3), 4, "more than int32 counts: at most 46340"),
  ],
)
def test_lookup_refuses(queries, codebooks, k, words):
  shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (queries, codebooks))
  with pytest.raises(ValueError, match=words):
    jax.eval_shape(functools.partial(product_keys.lookup, top_k=k), *shapes)


def model_config(pattern=("memory",), **fields):
  memory = MemoryConfig(rule="linear", chunk=4, segment_length=4)
  sizes = dict(vocab_size=32, layers=2, d_model=16, heads=2, mlp_dim=16, remat="none")
  sizes |= dict(memory=memory, feed_forward=("swiglu", "product_keys"), product_keys=SMALL)
  return ModelConfig(**(sizes | fields), pattern=pattern)


def layer_of(**options):
  config = model_config(product_keys=dataclasses.replace(SMALL, shared=False, **options))
  return product_keys.ProductKeys(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  "options", [{}, slow({"plus": False}), slow({"plus": False, "value_dim": 6}), {"value_dim": 6, "gate": True}], ids=str
)
def test_the_layer_is_its_formula(options):
  layer = layer_of(**options)
  for bias in ("query", "up", "down"):  # they start at 0
    if hasattr(layer, bias) and hasattr(getattr(layer, bias), "bias"):
      b = getattr(layer, bias).bias
      b[...] = jax.random.normal(jax.random.key(1), b.shape)
  x = np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 16)), np.float64)
  value = {
    "/".join(map(str, path)): np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(nnx.state(layer))
  }
  queries = np.einsum("bld,dhk->blhk", x, value["query/kernel"]) + value["query/bias"]
  weights, rows = brute_force(queries.reshape(10, 2, 6), value["codebooks"], 4)
  y = np.einsum("thk,thkd->td", weights, value["table/values"][rows]).reshape(2, 5, -1)

  def linear(name, x):
    return x @ value[f"{name}/kernel"] + value.get(f"{name}/bias", 0)

  if options.get("plus", True):
    gate = linear("up", x)
    y = linear("down", y * gate / (1 + np.exp(-gate)))
  elif y.shape != x.shape:
    y = linear("down", y)
  if options.get("gate"):
    y = y / (1 + np.exp(-linear("output_gate", x)))
  np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), y, rtol=2e-4, atol=2e-5)


def test_norms_of_queries_and_keys_make_scores_blind_to_their_lengths():
  layer = layer_of(qk_norm=True)
  x = jax.random.normal(jax.random.key(0), (1, 5, 16))
  before = layer.look_up(x)
  layer.codebooks[...] *= 10.0
  layer.query.kernel[...] *= 10.0
  after = layer.look_up(x)
  np.testing.assert_array_equal(before.rows, after.rows)
  np.testing.assert_allclose(before.weights, after.weights, rtol=1e-3)


def test_parameters_start_as_the_paper_has_them():
  options = ProductKeysConfig(codebook=64, key_dim=32, heads=2, top_k=4)
  model = LanguageModel(model_config(d_model=64, product_keys=options), nnx.Rngs(0))
  layer, values = model.blocks["1"].mlp, model.shared["product_keys"].values[...]
  codebooks, query = layer.codebooks[...], layer.query.kernel[...]
  assert values.shape == (64 * 64, 64)
  np.testing.assert_allclose(values.std(), 64**-0.5, rtol=0.02)
  for uniform, bound in ((codebooks, 32**-0.5), (query, (6 / (64 + 2 * 32)) ** 0.5)):
    assert 0.99 * bound < jnp.abs(uniform).max() <= bound
    np.testing.assert_allclose(uniform.std(), bound / 3**0.5, rtol=0.03)
  for matrix in (layer.up.kernel[...], layer.down.kernel[...]):
    np.testing.assert_allclose(matrix.std(), 64**-0.5, rtol=0.05)


def tables(params):
  return [leaf for path, leaf in traverse_util.flatten_dict(params).items() if path[-1] == "values"]


def test_all_layers_read_one_table_or_one_each():
  def values(**options):
    config = model_config(layers=4, product_keys=dataclasses.replace(SMALL, **options))
    graph = jax.eval_shape(lambda: nnx.split(LanguageModel(config, nnx.Rngs(0))))
    return [leaf.shape for leaf in tables(nnx.to_pure_dict(graph[1]))]

  assert values() == [(64, 16)]
  assert values(shared=False) == [(2, 64, 16)]


@pytest.fixture(scope="module")
def made():
  return functools.cache(lambda pattern: LanguageModel(model_config(pattern), nnx.Rngs(0)))


@pytest.mark.parametrize("pattern", [("memory",), slow(("attention",))])
def test_prompts_and_steps_are_the_forward_pass(made, pattern):
  model = made(pattern)
  tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 32)
  expected, cache_config = jit(model)(tokens), CacheConfig(tokens=12)
  logits, cache = model.prefill(tokens[:, :7], cache_config)
  advance = jit(lambda token, cache: model.step(token, cache, cache_config))
  for t in range(7, 13):
    np.testing.assert_allclose(logits, expected[:, t - 1], atol=2e-5)
    if t < 12:
      logits, cache = advance(tokens[:, t], cache)


def test_tokens_see_no_later_ones_and_no_other_document(made):
  model = made(("memory",))
  tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, 32)
  documents = jnp.asarray([[1] * 5 + [2] * 5 + [0] * 2])
  forward = jit(model)
  before = forward(tokens, documents)
  after = forward(tokens.at[0, 5:].set(3), documents)
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  after = forward(tokens.at[0, :5].set(3), documents)
  np.testing.assert_array_equal(before[:, 5:10], after[:, 5:10])


def test_usage_counts_every_tokens_weight_but_paddings(made):
  model = made(("memory",))
  tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 32)
  mass = inspection.values_read(model, tokens, None)
  assert mass.shape == (1, 64)
  np.testing.assert_allclose(mass.sum(), 2 * 6 * SMALL.heads, rtol=1e-5)
  documents = jnp.asarray([[1, 1, 1, 1, 0, 0]] * 2)
  np.testing.assert_allclose(inspection.values_read(model, tokens, documents).sum(), 2 * 4 * SMALL.heads, rtol=1e-5)
  used, divergence = inspection.spread(jnp.eye(1, 64))
  assert used == 1 / 64
  np.testing.assert_allclose(divergence, np.log(64), rtol=1e-6)
  np.testing.assert_allclose(inspection.spread(jnp.full((1, 64), 0.5)), ([1], [0]), atol=1e-6)


def searches(jaxpr):
  """How often top_k is in a program, also within its loops and functions."""
  inner = (sub for eqn in jaxpr.eqns for sub in jax.extend.core.jaxprs_in_params(eqn.params))
  return sum(eqn.primitive.name == "top_k" for eqn in jaxpr.eqns) + sum(map(searches, inner))


@pytest.mark.parametrize("remat", ["full", slow("dots")])
def test_nothing_is_looked_up_again_for_the_backward_pass(remat):
  """The layer is not rematerialised: its weights, rows and answers are kept."""
  tokens = jnp.zeros((1, 8), jnp.int32)

  def gradient(remat):
    graph, params = nnx.split(LanguageModel(model_config(remat=remat), nnx.Rngs(0)))
    return jax.grad(lambda params: nnx.merge(graph, params)(tokens).astype(jnp.float32).std()), params

  grad, params = gradient(remat)
  assert searches(jax.make_jaxpr(grad)(params).jaxpr) == 1
  again, params = gradient("none")
  for got, expected in zip(jax.tree.leaves(jit(grad)(params)), jax.tree.leaves(jit(again)(params)), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def run_config(tiny, mesh, **options):
  config = tiny(batch_size=8, warmup_steps=0, epsilon=1e-2, steps=3, **mesh)
  options = dataclasses.replace(SMALL, **options)
  return dataclasses.replace(config, model=model_config(vocab_size=256, product_keys=options)).check()


def trained(config, devices):
  """The state after two steps on random rows, and the losses."""
  mesh = config.make_mesh(jax.devices()[:devices])
  rng = np.random.default_rng(0)
  shape = config.data.batch_size, config.data.length
  batch = {name: rng.integers(0, 256, shape).astype(np.int32) for name in ("tokens", "targets")}
  batch["weights"] = np.ones(shape, np.float32)
  current, losses = state.create(config, mesh), []
  update = jit(step.train_step(config, mesh))
  with jax.set_mesh(mesh):
    for _ in range(2):
      current, metrics = update(current, batch)
      losses.append(metrics["loss"])
  return jax.device_get(current), np.asarray(losses), current


@pytest.mark.parametrize(
  ("mesh", "options"),
  [
    ({"data": 2, "fsdp": 2, "model": 2}, {}),
    slow({"data": 1, "fsdp": 8}, {}),
    slow({"data": 1, "fsdp": 4, "context": 2}, {"shared": False}),
    slow({"data": 4, "model": 2}, {"shared": False, "plus": False}),
  ],
  ids=str,
)
def test_meshes_train_as_one_device_does(tiny, mesh, options):
  alone, losses, _ = trained(run_config(tiny, {}, **options), 1)
  split, same, placed = trained(run_config(tiny, mesh, **options), 8)
  np.testing.assert_allclose(same, losses, rtol=1e-5)
  for expected, got in zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-5)
  parts = mesh.get("fsdp", 1) * mesh.get("model", 1)
  found = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed)
    if jax.tree_util.keystr(path).endswith("['values']")
  ]
  assert len(found) == 3  # the table and both of its moments
  for leaf in found:
    assert leaf.addressable_shards[0].data.nbytes * parts == leaf.nbytes


@pytest.mark.slow
def test_one_row_is_read_on_many_devices(made):
  """Which its tokens do not divide: every device has all of them, and a slice of their answers."""
  model = made(("attention",))
  tokens = jax.random.randint(jax.random.key(0), (1, 8), 0, 32)
  mesh = jax.make_mesh((1, 4, 1, 2), ("data", "fsdp", "context", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 4)
  with jax.set_mesh(mesh):
    logits = jit(model)(tokens)
  np.testing.assert_allclose(logits, jit(model)(tokens), atol=2e-5)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"codebook": 0}, "codebook=0 must be at least 1"),
    ({"codebook": 46341}, "use at most 46340"),
    ({"top_k": 65}, "top_k=65 is more than the 64 values of model.product_keys.codebook=8"),
    ({"top_k": 0}, "top_k=0 must be at least 1"),
    ({"heads": 0}, "heads=0 must be at least 1"),
    ({"key_dim": 7}, "key_dim=7 must be even"),
    ({"value_dim": 0}, "value_dim=0 must be at least 1"),
  ],
  ids=str,
)
def test_bad_options_are_named(options, words):
  (problem,) = model_config(product_keys=dataclasses.replace(SMALL, **options)).problems()
  assert problem.startswith("model.product_keys.") and words in problem


def test_a_width_that_the_mesh_does_not_divide_is_named(tiny):
  config = run_config(tiny, {"data": 1, "fsdp": 8}, value_dim=12)
  with pytest.raises(ConfigError, match=r"model\.product_keys\.value_dim=12 is not divisible by .* = 8"):
    config.check_devices(8)


def test_more_memory_layers_than_blocks_are_refused():
  (problem,) = model_config(feed_forward=("swiglu", "product_keys", "product_keys")).problems()
  assert "model.layers=2 must be a multiple" in problem and "swiglu,product_keys,product_keys" in problem


def test_an_odd_width_needs_a_key_dim():
  options = dataclasses.replace(SMALL, key_dim=None)
  (problem,) = model_config(d_model=15, heads=3, product_keys=options).problems()
  assert "model.product_keys.key_dim must be given" in problem


def test_exported_weights_come_back(made, tmp_path):
  model = made(("memory",))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  export.save(tmp_path, model.config, params)
  config, loaded = export.load(tmp_path)
  assert config == model.config
  jax.tree.map(np.testing.assert_array_equal, params, loaded)
