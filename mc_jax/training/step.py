"""One update, and one evaluation: pure functions of parameters and a batch, compiled for a mesh."""

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
  """weight * -log p(target) of every token, in nats, [batch, length] float32.

  Args:
    graph: of the model, see state.graph.
    params: of the model.
    batch: [batch, length] arrays, see data/windows.py.
  """
  model = nnx.merge(graph, params)
  logits = model(batch["tokens"], batch.get("segment_ids"))
  return scoring.losses(logits, batch["targets"]) * batch["weights"]


def loss_sum(graph: nnx.GraphDef, params: dict, batch: Batch) -> jax.Array:
  """Sum of `token_losses`, float32 scalar."""
  return jnp.sum(token_losses(graph, params, batch))


def train_step(config: Config, mesh: jax.sharding.Mesh) -> Callable:
  """(state, batch) -> (new state, {"loss", "grad_norm", "learning_rate", "skipped"}), to be jitted; see `lower`.

  The loss is the mean over the tokens that count, before the update, in nats. With
  train.microbatches = k the batch is worked through in k parts; the gradient is that of the
  whole batch, whatever the parts' shares of the weights.

  Where the loss or the gradient is not finite the update is skipped: parameters and moments stay, the schedule goes on.
  "skipped" counts how many were in a row; from train.max_skipped on nothing is updated any more, so that the loop,
  which looks at this later, has the state that they met.
  """
  graph = states.graph(config)
  lies = states.shardings(states.abstract(config, mesh).params)
  optimizer = adamw(config.optimizer, config.train.steps)
  learning_rate = schedule(config.optimizer, config.train.steps)
  parts = config.train.microbatches

  def gradient_of_part(params: dict, part: Batch, total: jax.Array) -> tuple[jax.Array, dict]:
    loss, grads = jax.value_and_grad(lambda p: loss_sum(graph, p, part) / total)(params)
    # Each device is left with the sum of its own part of a gradient (a reduce-scatter), not with all of it.
    return loss, jax.lax.with_sharding_constraint(grads, lies)

  def gradient(params: dict, batch: Batch) -> tuple[jax.Array, dict]:
    total = jnp.maximum(batch["weights"].sum(), 1.0)
    if parts == 1:
      return gradient_of_part(params, batch, total)

    def split(x):  # rows i, i + parts, ... make up part i: every device has rows of every part, and keeps them
      x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
      return axes.constrain(x, (None, *axes.TOKENS))

    def accumulate(sums, part):
      return jax.tree.map(jnp.add, sums, gradient_of_part(params, part, total)), None

    zeros = (jnp.zeros((), jnp.float32), jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, params), lies))
    return jax.lax.scan(accumulate, zeros, jax.tree.map(split, batch))[0]

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    loss, grads = gradient(state.params, batch)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    good = jnp.isfinite(loss) & jnp.isfinite(norm) & (state.skipped < config.train.max_skipped)

    def taken(new: jax.Array, old: jax.Array) -> jax.Array:
      counts = jnp.issubdtype(new.dtype, jnp.integer)  # updates, by which the schedule goes
      return new if counts else jnp.where(good, new, old)

    params, opt_state = jax.tree.map(taken, (params, opt_state), (state.params, state.opt_state))
    skipped = jnp.where(good, 0, state.skipped + 1)
    metrics = {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate(state.step), "skipped": skipped}
    return TrainState(params, opt_state, state.step + 1, skipped), metrics

  return step


def lower(config: Config, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
  """The training step for a mesh, ready to be compiled: (state, batch) -> (new state, scalars on every device).

  The state is donated. Nothing runs: the mesh's devices need not exist.
  """
  state = states.abstract(config, mesh)
  out_shardings = (states.shardings(state), axes.sharding(mesh, ()))
  update = jax.jit(train_step(config, mesh), donate_argnums=0, out_shardings=out_shardings)
  with jax.set_mesh(mesh):
    return update.lower(state, windows.shapes(config.data, mesh))
