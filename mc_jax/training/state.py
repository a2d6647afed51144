"""What a step of training changes: parameters, the optimiser's moments, the step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mc_jax import models
from mc_jax.training.config import Config
from mc_jax.training.optimizer import adamw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """A pytree of arrays, and nothing else: what a checkpoint holds."""

  params: dict  # nested dict of float32 arrays
  opt_state: optax.OptState
  step: jax.Array  # int32 scalar: updates made


def graph(config: Config) -> nnx.GraphDef:
  """The model without its parameters: `nnx.merge(graph, params)` is a model."""
  return nnx.graphdef(nnx.eval_shape(lambda: _model(config)))


def create(config: Config) -> TrainState:
  """The state before the first step; the same for the same train.seed."""

  @jax.jit
  def init() -> TrainState:
    params = nnx.to_pure_dict(nnx.state(_model(config), nnx.Param))
    optimizer = adamw(config.optimizer, config.train.steps)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

  return init()


def abstract(config: Config) -> TrainState:
  """Shapes and dtypes of `create`'s state, computed without making it."""
  return jax.eval_shape(lambda: create(config))


def parameter_count(state: TrainState) -> int:
  """Numbers that are learned."""
  return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def _model(config: Config) -> models.LanguageModel:
  return models.LanguageModel(config.model, rngs=nnx.Rngs(config.train.seed))
