"""One update, and one evaluation: pure functions of parameters and a batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mc_jax.training.config import Config
from mc_jax.training.optimizer import adamw, schedule
from mc_jax.training.state import TrainState

Batch = dict[str, jax.Array]


def loss_sum(graph: nnx.GraphDef, params: dict, batch: Batch) -> jax.Array:
  """Sum over the batch of weight * -log p(target), in nats, float32 scalar.

  Args:
    graph: of the model, see state.graph.
    params: of the model.
    batch: [batch, length] arrays, see data/windows.py.
  """
  model = nnx.merge(graph, params)
  logits = model(batch["tokens"], batch.get("segment_ids")).astype(jnp.float32)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
  return jnp.sum(loss * batch["weights"])


def train_step(config: Config, graph: nnx.GraphDef) -> Callable:
  """(state, batch) -> (new state, {"loss", "grad_norm", "learning_rate"}), to be jitted.

  The loss is the mean over the tokens that count, before the update, in nats. With
  train.microbatches = k the batch is worked through in k parts; the gradient is that of the
  whole batch, whatever the parts' shares of the weights.
  """
  optimizer = adamw(config.optimizer, config.train.steps)
  learning_rate = schedule(config.optimizer, config.train.steps)
  parts = config.train.microbatches

  def gradient(params: dict, batch: Batch) -> tuple[jax.Array, dict]:
    total = jnp.maximum(batch["weights"].sum(), 1.0)

    def mean_loss(params: dict, part: Batch) -> jax.Array:
      return loss_sum(graph, params, part) / total

    if parts == 1:
      return jax.value_and_grad(mean_loss)(params, batch)

    def accumulate(sums, part):
      return jax.tree.map(jnp.add, sums, jax.value_and_grad(mean_loss)(params, part)), None

    split = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), batch)
    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(accumulate, zeros, split)[0]

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    loss, grads = gradient(state.params, batch)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {
      "loss": loss,
      "grad_norm": optax.tree.norm(grads),
      "learning_rate": learning_rate(state.step),
    }
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1), metrics

  return step


def eval_step(graph: nnx.GraphDef) -> Callable:
  """(params, batch) -> (sum of the loss in nats, sum of the weights), to be jitted."""

  def step(params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return loss_sum(graph, params, batch), batch["weights"].sum()

  return step
