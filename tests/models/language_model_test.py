"""The model as a whole: what holds for all of its mixers, packed documents included.

Compiling dominates: each configuration is compiled once (`compiled`), and every property that holds for all of them is
tested on that one function by changing its data.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marks import slow
from quick_compile import jit

from mc_jax.models import LanguageModel, MemoryConfig, ModelConfig
from mc_jax.models.block import Block
from mc_jax.models.language_model import number_documents

VOCAB, LENGTH = 13, 24  # three segments of 8, chunks of 4
# Documents of a row: one that starts inside a chunk, one on a segment boundary, one across a segment
# boundary, two in one chunk, padding between and after, a row of padding only.
SEGMENT_IDS = np.array(
  [
    [1, 1, 1, 2, 2, 2, 2, 0, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 0, 0],
    [0, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 1, 5, 5, 5, 5, 5, 5],
    [0] * 24,
  ]
)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, SEGMENT_IDS.shape)
EVERYWHERE = np.ones(TOKENS.shape, np.float32)


def tiny(pattern="memory", **memory_options) -> ModelConfig:
  return ModelConfig(
    vocab_size=VOCAB,
    layers=2,
    d_model=16,
    heads=2,
    mlp_dim=16,
    pattern=(pattern,),
    remat="none",
    memory=MemoryConfig(chunk=4, segment_length=8, expansion=2, **memory_options),
  )


TRANSFORMER = tiny("attention")
TITANS = tiny()
SWLA = tiny(rule="swla", aggregation="ssc", carry="independent")
LINEAR = tiny(rule="linear")
NAMES = {TRANSFORMER: "transformer", TITANS: "titans-grm", SWLA: "swla-ssc-independent", LINEAR: "linear-grm"}


def configs(*several):
  cases = [slow(config, id=NAMES[config]) if config == SWLA else config for config in several]
  return pytest.mark.parametrize("config", cases, ids=NAMES.get)


def make(config):
  # Drawing numbers with rbg keys compiles an order of magnitude faster than with threefry.
  return LanguageModel(config, nnx.Rngs(jax.random.key(0, impl="rbg")))


@functools.cache
def compiled(config):
  """(parameters, step); step(parameters, tokens, segment_ids, weights) -> (logits, gradients).

  The loss is the weighted sum of the tokens' cross entropy with fixed targets.
  """
  graph, parameters = nnx.split(make(config))
  targets = np.random.default_rng(1).integers(0, VOCAB, SEGMENT_IDS.shape)

  @jit
  def step(parameters, tokens, segment_ids, weights):
    def loss(parameters):
      logits = nnx.merge(graph, parameters)(tokens, segment_ids)
      chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
      return -(chosen * weights).sum(), logits

    gradients, logits = jax.grad(loss, has_aux=True)(parameters)
    return logits, gradients

  return parameters, step


def test_documents_are_numbered_and_padding_is_not():
  segment_ids = jnp.array([[7, 7, 3, 3, 0, 3, 0, 0], [0, 0, 5, 5, 5, 7, 7, 7]])
  expected = jnp.array([[1, 1, 2, 2, 0, 3, 0, 0], [0, 0, 1, 1, 1, 2, 2, 2]], jnp.int32)
  chex.assert_trees_all_equal(number_documents(segment_ids), expected)


def arrays(tree):
  """{path: array} of a state of parameters."""
  return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(tree)}


@configs(TRANSFORMER, TITANS, SWLA)
def test_every_parameter_of_every_layer_gets_a_finite_gradient_that_is_not_zero(config):
  parameters, step = compiled(config)
  logits, gradients = step(parameters, TOKENS, SEGMENT_IDS, (SEGMENT_IDS != 0).astype(np.float32))
  chex.assert_shape(logits, (*TOKENS.shape, VOCAB))
  chex.assert_tree_all_finite((logits, gradients))  # the row of padding included
  for path, gradient in arrays(gradients).items():
    by_layer = gradient if path.startswith("blocks") else gradient[None]
    assert (jnp.abs(by_layer).max(axis=range(1, by_layer.ndim)) > 0).all(), path


@configs(TRANSFORMER, TITANS, SWLA)
def test_a_token_changes_no_logit_before_it(config):
  parameters, step = compiled(config)
  one_document = np.ones_like(SEGMENT_IDS)
  before, _ = step(parameters, TOKENS, one_document, EVERYWHERE)
  for t in (5, 8, 17):
    changed = TOKENS.copy()
    changed[:, t] = (changed[:, t] + 1) % VOCAB
    after, _ = step(parameters, changed, one_document, EVERYWHERE)
    chex.assert_trees_all_equal(after[:, :t], before[:, :t])
    assert (after[:, t] != before[:, t]).any()
    assert (after[:, -1] != before[:, -1]).any()  # and is remembered to the end


@configs(TRANSFORMER, TITANS, SWLA)
def test_a_packed_document_has_the_logits_and_gradients_that_it_has_among_padding(config):
  parameters, step = compiled(config)
  for row, document in [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5)]:
    mine = document == SEGMENT_IDS
    mine[np.arange(3) != row] = False
    weights = mine.astype(np.float32)
    packed, packed_gradients = step(parameters, TOKENS, SEGMENT_IDS, weights)
    alone, alone_gradients = step(parameters, TOKENS * mine, SEGMENT_IDS * mine, weights)
    chex.assert_trees_all_close(packed[mine], alone[mine], atol=1e-5)
    packed_gradients, alone_gradients = arrays(packed_gradients), arrays(alone_gradients)
    for path, gradient in packed_gradients.items():
      chex.assert_trees_all_close(gradient, alone_gradients[path], atol=1e-5 * max(1.0, float(jnp.abs(gradient).max())))


@configs(TRANSFORMER, TITANS, SWLA)
def test_a_document_on_a_segment_boundary_has_the_logits_that_it_has_alone(config):
  parameters, step = compiled(config)
  packed, _ = step(parameters, TOKENS, SEGMENT_IDS, EVERYWHERE)
  moved = np.roll(TOKENS, -8, axis=1), np.roll(SEGMENT_IDS * (SEGMENT_IDS == 3), -8, axis=1)
  alone, _ = step(parameters, *moved, EVERYWHERE)
  chex.assert_trees_all_close(packed[0, 8:22], alone[0, :14], atol=1e-5)


@configs(TRANSFORMER, TITANS, SWLA)
def test_a_row_of_one_document_is_a_row_without_segment_ids(config):
  parameters, step = compiled(config)
  marked, _ = step(parameters, TOKENS, np.full_like(SEGMENT_IDS, 7), EVERYWHERE)
  unmarked = jit(make(config).__call__)(TOKENS)
  chex.assert_trees_all_close(marked, unmarked, atol=1e-5)


@configs(TRANSFORMER, LINEAR)
def test_layers_are_scanned_as_a_loop_would_run_them(config):
  model = make(config)
  graph, layers = nnx.split(model.blocks)

  @jit
  def loop(tokens):
    x = model.embed(tokens)
    for layer in range(config.layers):
      x, _ = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[layer], layers))(x)
    return model.logits(x)

  chex.assert_trees_all_close(jit(model.__call__)(TOKENS), loop(TOKENS), atol=1e-5)


@pytest.mark.parametrize("remat", ["full", slow("dots")])
def test_rematerialisation_does_not_change_gradients(remat):
  parameters, step = compiled(TRANSFORMER)
  _, remat_step = compiled(dataclasses.replace(TRANSFORMER, remat=remat))
  data = parameters, TOKENS, SEGMENT_IDS, EVERYWHERE
  chex.assert_trees_all_close(arrays(remat_step(*data)[1]), arrays(step(*data)[1]), rtol=1e-4, atol=1e-4)


def test_rematerialisation_saves_what_its_policy_says():
  """The backward pass of "none" runs no product twice; "full" runs the forward's again."""

  def products(remat):
    graph, parameters = nnx.split(make(dataclasses.replace(TRANSFORMER, remat=remat)))

    def loss(parameters):
      return nnx.merge(graph, parameters)(TOKENS).sum()

    return str(jax.make_jaxpr(jax.grad(loss))(parameters)).count("dot_general")

  assert products("none") < products("dots") < products("full")


@configs(TRANSFORMER, TITANS)
def test_bfloat16_is_close_to_float32(config):
  """Within 3% of the logits' spread (8 bits of mantissa, 2 layers); parameters stay float32."""
  low = make(dataclasses.replace(config, dtype="bfloat16"))
  chex.assert_type(jax.tree.leaves(nnx.state(low)), jnp.float32)
  parameters, step = compiled(config)
  valid = SEGMENT_IDS != 0
  logits = step(parameters, TOKENS, SEGMENT_IDS, EVERYWHERE)[0][valid]
  low_logits = jit(low.__call__)(TOKENS, SEGMENT_IDS)[valid]
  assert low_logits.dtype == jnp.float32
  error = jnp.sqrt(jnp.square(low_logits - logits).mean())
  assert 1e-4 * logits.std() < error < 0.03 * logits.std()  # above 0: it did compute in bfloat16


def test_tied_embeddings_save_the_readout():
  tied = arrays(nnx.state(make(TRANSFORMER)))
  untied = arrays(nnx.state(make(dataclasses.replace(TRANSFORMER, tied_embeddings=False))))
  assert set(untied) - set(tied) == {"readout/kernel"}
  chex.assert_shape(untied["readout/kernel"], (16, VOCAB))


@pytest.mark.parametrize("tied", [True, slow(False)])
def test_a_model_starts_unsure(tied):
  """The first loss is near log(vocab_size): logits of unit variance, half a nat above."""
  config = dataclasses.replace(TRANSFORMER, d_model=64, vocab_size=256, layers=8, tied_embeddings=tied)
  tokens = np.random.default_rng(0).integers(0, 256, (4, 64))
  model = make(config)
  logits = jit(model.__call__)(tokens)
  assert 0.7 < logits.std() < 1.4
  assert 0.8 < model.embed(tokens).std() < 1.2


def test_parameters_carry_names_for_their_axes_and_need_no_mesh():
  state = nnx.state(make(TITANS))
  for path, leaf in nnx.to_flat_state(state):
    assert len(leaf.out_sharding) == leaf[...].ndim, path
    assert (leaf.out_sharding[0] == "layers") == (path[0] == "blocks"), path
  names = {path: leaf.out_sharding for path, leaf in nnx.to_flat_state(state)}
  assert names["blocks", "mixer", "projection", "kernel"] == ("layers", "embed", "projection", "heads", "head_dim")
  assert names["blocks", "mixer", "initial", "w1"][:2] == ("layers", "heads")
  with nnx.logical_axis_rules([("vocab", "model"), ("embed", "fsdp")]):
    spec = nnx.get_partition_spec(state)
  assert spec["embedding"].get_value() == jax.P("model", "fsdp")


def test_layers_start_apart():
  for path, leaf in arrays(nnx.state(make(TITANS).blocks)).items():
    if "norm" not in path and "bias" not in path:
      assert (leaf[0] != leaf[1]).any(), path


def test_a_block_keeps_shape_and_dtype():
  config = dataclasses.replace(TRANSFORMER, dtype="bfloat16")
  x = jnp.ones((2, 5, 16), jnp.bfloat16)
  y, _ = jax.eval_shape(Block(config, rngs=nnx.Rngs(0)), x)
  chex.assert_equal_shape([x, y])
  assert y.dtype == jnp.bfloat16
