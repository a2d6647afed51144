"""A sample of what a model has learned, by full forward passes over a fixed window."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_jax.parallel import axes


def sample(
  graph: nnx.GraphDef,
  params: dict,
  prompt: np.ndarray,
  mesh: jax.sharding.Mesh,
  *,
  length: int,
  window: int,
  temperature: float,
  seed: int,
) -> np.ndarray:
  """Continues `prompt` by `length` tokens.

  Every token costs a forward pass over the last `window` tokens, which is simple and slow; the
  model sees nothing of what lies before the window.

  Args:
    graph: of the model, see state.graph.
    params: of the model.
    prompt: int [tokens], at least one.
    mesh: that the parameters lie on; every process of the job must take part.
    length: tokens to generate.
    window: tokens in a forward pass.
    temperature: logits are divided by it; 0 takes the likeliest token.
    seed: of the draws.

  Returns:
    The continuation alone, int32 [length].
  """

  rows = math.prod(mesh.shape[axis] for axis in axes.RULES["batch"])  # the same one for all

  @functools.partial(jax.jit, out_shardings=axes.sharding(mesh, ()))
  def next_token(params: dict, tokens: jax.Array, last: jax.Array, i: jax.Array) -> jax.Array:
    tokens = axes.constrain(jnp.tile(tokens, (rows, 1)), axes.TOKENS)
    logits = nnx.merge(graph, params)(tokens)[0, last].astype(jnp.float32)
    if temperature == 0:
      return logits.argmax()
    key = jax.random.fold_in(jax.random.key(seed), i)
    return jax.random.categorical(key, logits / temperature)

  tokens = [int(token) for token in prompt]
  for i in range(length):
    seen = tokens[-window:]
    row = np.zeros(window, np.int32)  # what follows the last token is padding: the model is causal
    row[: len(seen)] = seen
    tokens.append(int(next_token(params, row, np.int32(len(seen) - 1), np.int32(i))))
  return np.array(tokens[len(prompt) :], np.int32)
