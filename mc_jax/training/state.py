"""The state of training, parameters, the optimiser's moments and the step, and its sharding on a mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

from mc_jax import models
from mc_jax.parallel import axes
from mc_jax.training.config import Config
from mc_jax.training.optimizer import adamw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The state of training, a pytree of arrays, as stored in checkpoints."""

  params: dict  # nested dict of float32 arrays
  opt_state: optax.OptState
  step: jax.Array  # int32 scalar: number of steps done
  skipped: jax.Array  # int32 scalar: number of latest consecutive steps that were not finite and updated nothing


def graph(config: Config) -> nnx.GraphDef:
  """The model without its parameters: `nnx.merge(graph, params)` is a model."""
  return _abstract_model(config)[0]


def create(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
  """The initial state, initialised shard by shard; it depends on train.seed and not on the mesh."""

  def init() -> TrainState:
    params = nnx.to_pure_dict(nnx.state(_model(config), nnx.Param))
    optimizer = adamw(config.optimizer, config.train.steps)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

  init = jax.jit(init, out_shardings=shardings(abstract(config, mesh)))
  with jax.set_mesh(mesh):
    return init()


def abstract(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
  """Shapes, dtypes and shardings of `create`'s state. Nothing runs, so the mesh's devices need not exist.

  Parameters are sharded by the logical names of their axes (parallel/axes.py), the optimiser's moments like their
  parameters, and scalars are replicated.
  """

  def placed(x, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  variables = nnx.to_flat_state(_abstract_model(config)[1])
  params = traverse_util.unflatten_dict(
    {path: placed(x, axes.sharding(mesh, x.get_metadata("out_sharding"), x.shape)) for path, x in variables}
  )
  everywhere = axes.sharding(mesh, ())
  optimizer = adamw(config.optimizer, config.train.steps)
  opt_state = optax.tree.map_params(
    optimizer,
    lambda moment, param: placed(moment, param.sharding),
    jax.eval_shape(optimizer.init, params),
    params,
    transform_non_params=lambda x: placed(x, everywhere),
  )
  count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
  return TrainState(params, opt_state, count, count)


def shardings(tree):
  """The shardings of a tree's arrays, concrete or abstract."""
  return jax.tree.map(lambda x: x.sharding, tree)


def parameter_count(state: TrainState) -> int:
  """The number of learned parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def _model(config: Config) -> models.LanguageModel:
  return models.LanguageModel(config.model, rngs=nnx.Rngs(config.train.seed))


def _abstract_model(config: Config) -> tuple[nnx.GraphDef, nnx.State]:
  # Not with nnx.eval_shape, which would take logical names for axes of the current mesh.
  return jax.eval_shape(lambda: nnx.split(_model(config)))
