"""The loss and the update of a training step: pure functions of parameters and a batch, compiled for a mesh."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mc_jax.data import windows
from mc_jax.evaluation import scoring
from mc_jax.parallel import axes
from mc_jax.training import state as states
from mc_jax.training.config import Config
from mc_jax.training.optimizer import adamw, schedule
from mc_jax.training.state import TrainState

Batch = dict[str, jax.Array]


def token_losses(graph: nnx.GraphDef, params: dict, batch: Batch) -> jax.Array:
  """weight * -log p(target) of every token in nats, [batch, length] float32.

  Args:
    graph: The model's graph, see state.graph.
    params: The model's parameters.
    batch: [batch, length] arrays, see data/windows.py.
  """
  model = nnx.merge(graph, params)
  logits = model(batch["tokens"], batch.get("segment_ids"))
  return scoring.losses(logits, batch["targets"]) * batch["weights"]


def loss_sum(graph: nnx.GraphDef, params: dict, batch: Batch) -> jax.Array:
  """The sum of `token_losses`, a float32 scalar."""
  return jnp.sum(token_losses(graph, params, batch))


def train_step(config: Config, mesh: jax.sharding.Mesh) -> Callable:
  """(state, batch) -> (new state, {"loss", "grad_norm", "learning_rate", "skipped"}), to be jitted; see `lower`.

  The loss is the weighted mean over tokens in nats, before the update. With train.microbatches = k the batch is
  processed in k parts; the gradient is that of the whole batch, however its weights are divided among them.

  If the loss or the gradient is not finite, the update is skipped: parameters and moments stay, the schedule advances.
  "skipped" counts consecutive skipped updates; from train.max_skipped on nothing is updated, so that the loop, which
  examines the counts later, still has the state in which they failed.
  """
  graph = states.graph(config)
  shardings = states.shardings(states.abstract(config, mesh).params)
  optimizer = adamw(config.optimizer, config.train.steps)
  learning_rate = schedule(config.optimizer, config.train.steps)
  microbatches = config.train.microbatches

  def partial_gradient(params: dict, microbatch: Batch, total: jax.Array) -> tuple[jax.Array, dict]:
    loss, grads = jax.value_and_grad(lambda p: loss_sum(graph, p, microbatch) / total)(params)
    # Each device keeps only its own shard of the summed gradient: a reduce-scatter.
    return loss, jax.lax.with_sharding_constraint(grads, shardings)

  def gradient(params: dict, batch: Batch) -> tuple[jax.Array, dict]:
    total = jnp.maximum(batch["weights"].sum(), 1.0)
    if microbatches == 1:
      return partial_gradient(params, batch, total)

    def split(x):  # microbatch i has the rows i, i + microbatches, ...: every device has rows of each already
      x = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1)
      return axes.constrain(x, (None, *axes.TOKENS))

    def accumulate(sums, microbatch):
      return jax.tree.map(jnp.add, sums, partial_gradient(params, microbatch, total)), None

    zeros = (
      jnp.zeros((), jnp.float32),
      jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, params), shardings),
    )
    return jax.lax.scan(accumulate, zeros, jax.tree.map(split, batch))[0]

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    loss, grads = gradient(state.params, batch)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & (state.skipped < config.train.max_skipped)

    def select(new: jax.Array, old: jax.Array) -> jax.Array:
      counts = jnp.issubdtype(new.dtype, jnp.integer)  # of updates, which the schedule depends on
      return new if counts else jnp.where(finite, new, old)

    params, opt_state = jax.tree.map(select, (params, opt_state), (state.params, state.opt_state))
    skipped = jnp.where(finite, 0, state.skipped + 1)
    metrics = {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate(state.step), "skipped": skipped}
    return TrainState(params, opt_state, state.step + 1, skipped), metrics

  return step


def lower(config: Config, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
  """The training step lowered for a mesh: (state, batch) -> (new state, replicated scalars).

  The state is donated. Nothing runs, so the mesh's devices need not exist.
  """
  state = states.abstract(config, mesh)
  out_shardings = (states.shardings(state), axes.sharding(mesh, ()))
  update = jax.jit(train_step(config, mesh), donate_argnums=0, out_shardings=out_shardings)
  with jax.set_mesh(mesh):
    return update.lower(state, windows.shapes(config.data, mesh))
