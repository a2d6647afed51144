"""The model as a whole, for every rule and aggregation and for the baseline.

Compiling dominates: each configuration is compiled once (`compiled`), and every property that holds for
all of them is tested on that one function by changing its data.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mc_jax import memory
from mc_jax.models import LanguageModel, MemoryConfig, ModelConfig
from mc_jax.models.block import Block
from mc_jax.models.config import AGGREGATIONS

VOCAB, LENGTH = 13, 22  # segments of 8, 8 and a ragged 6; chunks of 4
# Documents of a row: one that starts inside a chunk, one on a segment boundary, one across a segment
# boundary, two in one chunk, padding between and after.
SEGMENT_IDS = np.array(
  [
    [1, 1, 1, 2, 2, 2, 2, 0, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 0],
    [0, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 1, 5, 5, 5, 5, 5],
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
  ]
)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, SEGMENT_IDS.shape)


def tiny(**memory_options) -> ModelConfig:
  options = {"chunk": 4, "segment_length": 8, "expansion": 2, "segment_group": 2, **memory_options}
  return ModelConfig(
    vocab_size=VOCAB,
    layers=2,
    d_model=16,
    heads=2,
    mlp_dim=16,
    max_length=LENGTH,
    memory=MemoryConfig(**options),
  )


TRANSFORMER = dataclasses.replace(tiny(), mixer="transformer")
CONFIGS = {
  "transformer": TRANSFORMER,
  **{
    f"{rule}-{aggregation}": tiny(rule=rule, aggregation=aggregation)
    for rule in memory.rules.NAMES
    for aggregation in AGGREGATIONS
  },
  "titans-grm-independent": tiny(carry="independent"),
  "swla-ssc-independent": tiny(rule="swla", aggregation="ssc", carry="independent"),
  "titans-grm-token": tiny(gate="token"),
  "linear-grm-sigmoid": tiny(rule="linear", gate="sigmoid", pool="sum"),
  "linear-grm-shared": tiny(rule="linear", shared_query=True),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def make(config, seed=0):
  return LanguageModel(config, nnx.Rngs(seed))


@functools.cache
def compiled(config):
  """(parameters, step); step(parameters, tokens, segment_ids, weights) -> (logits, gradients).

  The loss weighs a token's mean log-probability of fixed targets: it reads every logit.
  """
  graph, parameters = nnx.split(make(config))
  targets = np.random.default_rng(1).integers(0, VOCAB, SEGMENT_IDS.shape)

  @jax.jit
  def step(parameters, tokens, segment_ids, weights):
    def loss(parameters):
      logits = nnx.merge(graph, parameters)(tokens, segment_ids)
      chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
      return -(chosen * weights).sum(), logits

    gradients, logits = jax.grad(loss, has_aux=True)(parameters)
    return logits, gradients

  return parameters, step


def arrays(tree):
  """{path: array} of a state of parameters."""
  return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(tree)}


@every_config
def test_every_parameter_of_every_layer_gets_a_finite_gradient_that_is_not_zero(config):
  parameters, step = compiled(config)
  logits, gradients = step(parameters, TOKENS, SEGMENT_IDS, (SEGMENT_IDS != 0).astype(np.float32))
  chex.assert_shape(logits, (*TOKENS.shape, VOCAB))
  chex.assert_tree_all_finite((logits, gradients))  # the row of padding included
  for path, gradient in arrays(gradients).items():
    by_layer = gradient if path.startswith("blocks") else gradient[None]
    assert (jnp.abs(by_layer).max(axis=range(1, by_layer.ndim)) > 0).all(), path


@every_config
def test_a_token_changes_no_logit_before_it(config):
  parameters, step = compiled(config)
  one_document = np.ones_like(SEGMENT_IDS)
  weights = np.ones(TOKENS.shape, np.float32)
  before, _ = step(parameters, TOKENS, one_document, weights)
  for t in (5, 8, 17):
    changed = TOKENS.copy()
    changed[:, t] = (changed[:, t] + 1) % VOCAB
    after, _ = step(parameters, changed, one_document, weights)
    chex.assert_trees_all_equal(after[:, :t], before[:, :t])
    assert (after[:, t] != before[:, t]).any()
    assert (after[:, -1] != before[:, -1]).any()  # and is remembered to the end


@every_config
def test_a_packed_document_has_the_logits_and_gradients_that_it_has_among_padding(config):
  parameters, step = compiled(config)
  for row, document in [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5)]:
    mine = SEGMENT_IDS == document
    mine[np.arange(3) != row] = False
    weights = mine.astype(np.float32)
    packed, packed_gradients = step(parameters, TOKENS, SEGMENT_IDS, weights)
    alone, alone_gradients = step(parameters, TOKENS * mine, SEGMENT_IDS * mine, weights)
    chex.assert_trees_all_close(packed[mine], alone[mine], atol=1e-5)
    packed_gradients, alone_gradients = arrays(packed_gradients), arrays(alone_gradients)
    for path, gradient in packed_gradients.items():
      chex.assert_trees_all_close(
        gradient, alone_gradients[path], atol=1e-5 * max(1.0, float(jnp.abs(gradient).max()))
      )


@every_config
def test_a_document_on_a_segment_boundary_has_the_logits_that_it_has_alone(config):
  parameters, step = compiled(config)
  weights = np.ones(TOKENS.shape, np.float32)
  packed, _ = step(parameters, TOKENS, SEGMENT_IDS, weights)
  moved = np.roll(TOKENS, -8, axis=1), np.roll(SEGMENT_IDS * (SEGMENT_IDS == 3), -8, axis=1)
  alone, _ = step(parameters, *moved, weights)
  chex.assert_trees_all_close(packed[0, 8:21], alone[0, :13], atol=1e-5)


@pytest.mark.parametrize("name", ["transformer", "titans-grm", "swla-ssc", "dla-soup"])
def test_a_row_of_one_document_is_a_row_without_segment_ids(name):
  parameters, step = compiled(CONFIGS[name])
  weights = np.ones(TOKENS.shape, np.float32)
  marked, _ = step(parameters, TOKENS, np.full_like(SEGMENT_IDS, 7), weights)
  unmarked = jax.jit(make(CONFIGS[name]).__call__)(TOKENS)
  chex.assert_trees_all_close(marked, unmarked, atol=1e-5)
