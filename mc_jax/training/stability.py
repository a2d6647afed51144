"""Looks into the memories while a model trains: their norms, their gates, and caches that no token reads."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax.memory import caching
from mc_jax.memory.networks import Weights
from mc_jax.models import inspection
from mc_jax.parallel import axes
from mc_jax.training import state
from mc_jax.training.config import Config
from mc_jax.training.step import Batch


def probe(config: Config, mesh: jax.sharding.Mesh) -> Callable[[dict, Batch], dict[str, jax.Array]]:
  """(params, batch) -> float32 scalars for the batch's first rows, one row per data-parallel device.

  * memory_norm, memory_norm_max: Frobenius norm of the online memories at the ends of segments, over all matrices of a
    memory; the mean and the maximum over layers, heads, rows and segments. momentum_norm, momentum_norm_max: the same
    for the momentum, in rules that have one.
  * gate_entropy: Entropy in nats of a token's gates over its online memory and caches, normalised to sum to 1; the mean
    over tokens that have a cache to read.
  * caches_never_selected: With ssc, the share of caches that tokens of their row could have read and none did.
  * values_used, values_kl: The share of memory layers' values that these rows read, and the divergence of the values'
    weight from equal shares (`inspection.spread`); the means over layers.

  It takes a forward pass of these rows with XLA, which is done only every few steps (docs/stability.md).
  """
  graph = state.graph(config)
  rows = axes.shards("batch", mesh.shape)

  def look(params: dict, batch: Batch) -> dict[str, jax.Array]:
    model = nnx.merge(graph, params)
    batch = {name: axes.constrain(x[:rows], axes.TOKENS) for name, x in batch.items()}
    tokens = batch["tokens"], batch.get("segment_ids")
    layers = inspection.look(model, *tokens, _of_layer) if config.model.has_memories else {}
    if config.model.has_values:
      used, divergence = inspection.spread(inspection.values_read(model, *tokens))
      layers |= {"values_used": used, "values_kl": divergence}
    return {name: values.max() if name.endswith("_max") else values.mean() for name, values in layers.items()}

  jitted = jax.jit(look, out_shardings=axes.sharding(mesh, ()))

  def run(params: dict, batch: Batch) -> dict[str, jax.Array]:
    with jax.set_mesh(mesh):
      return jitted(params, batch)

  return run


def _of_layer(cached: caching.Cached) -> dict[str, jax.Array]:
  """The scalars of one layer."""
  scalars = _norms("memory", cached.states.memory)
  momentum = getattr(cached.states, "momentum", None)
  if momentum is not None:
    scalars |= _norms("momentum", momentum)
  if cached.reads is not None:
    scalars["gate_entropy"] = _entropy(cached.reads)
    if cached.reads.index is not None:
      scalars["caches_never_selected"] = _never_selected(cached.reads)
  return scalars


def _norms(name: str, weights: Weights) -> dict[str, jax.Array]:
  squares = sum(jnp.sum(jnp.square(w), axis=(-2, -1)) for w in weights.values())
  norms = jnp.sqrt(squares)
  return {f"{name}_norm": norms.mean(), f"{name}_norm_max": norms.max()}


def _entropy(reads: caching.Reads) -> jax.Array:
  gamma = jnp.concatenate([reads.online[..., None], reads.cached], axis=-1)
  share = gamma / jnp.maximum(gamma.sum(-1, keepdims=True), jnp.finfo(gamma.dtype).tiny)
  entropy = jax.scipy.special.entr(share).sum(-1)
  reads_any = jnp.broadcast_to(reads.visible.any(-1), entropy.shape)
  return jnp.sum(entropy * reads_any) / jnp.maximum(reads_any.sum(), 1)


def _never_selected(reads: caching.Reads) -> jax.Array:
  caches = jnp.arange(reads.visible.shape[-1])
  chosen = (reads.index[..., None] == caches) & reads.kept[..., None]  # [b, h, length, k, n]
  selected = chosen.any(axis=(-3, -2))
  offered = jnp.broadcast_to(reads.visible.any(axis=-2), selected.shape)
  return (offered & ~selected).sum() / jnp.maximum(offered.sum(), 1)
