"""What a step of training changes: parameters, the optimiser's moments, the step; and where it lies on a mesh."""

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
  """A pytree of arrays, and nothing else: what a checkpoint holds."""

  params: dict  # nested dict of float32 arrays
  opt_state: optax.OptState
  step: jax.Array  # int32 scalar: steps done
  skipped: jax.Array  # int32 scalar: of the last ones, in a row, how many were not finite and updated nothing


def graph(config: Config) -> nnx.GraphDef:
  """The model without its parameters: `nnx.merge(graph, params)` is a model."""
  return _abstract_model(config)[0]


def create(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
  """The state before the first step, each device making its own part; the same for the same train.seed on any mesh."""

  def init() -> TrainState:
    params = nnx.to_pure_dict(nnx.state(_model(config), nnx.Param))
    optimizer = adamw(config.optimizer, config.train.steps)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

  init = jax.jit(init, out_shardings=shardings(abstract(config, mesh)))
  with jax.set_mesh(mesh):
    return init()


def abstract(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
  """Shapes, dtypes and shardings of `create`'s state; nothing runs, so the mesh's devices need not exist.

  Parameters lie as the logical names of their axes say (parallel/axes.py), the optimiser's moments like their
  parameters, and scalars on every device.
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
  """Where the arrays of a tree, real or abstract, lie."""
  return jax.tree.map(lambda x: x.sharding, tree)


def parameter_count(state: TrainState) -> int:
  """Numbers that are learned."""
  return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def _model(config: Config) -> models.LanguageModel:
  return models.LanguageModel(config.model, rngs=nnx.Rngs(config.train.seed))


def _abstract_model(config: Config) -> tuple[nnx.GraphDef, nnx.State]:
  # Not by nnx.eval_shape, which takes the logical names for axes of the mesh that is set.
  return jax.eval_shape(lambda: nnx.split(_model(config)))
