"""Samples text from a model by full forward passes over a fixed window."""

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

  Every token takes a forward pass over the last `window` tokens, which is simple and slow. The model does not see
  tokens before the window.

  Args:
    graph: The model's graph, see state.graph.
    params: The model's parameters.
    prompt: int [tokens], at least one.
    mesh: The parameters' mesh; every process of the job must take part.
    length: The number of tokens to generate.
    window: The number of tokens in a forward pass.
    temperature: Divides the logits; 0 takes the likeliest token.
    seed: The seed of the draws.

  Returns:
    The continuation without the prompt, int32 [length].
  """

  rows = math.prod(mesh.shape[axis] for axis in axes.RULES["batch"])  # the same row for all

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
    row = np.zeros(window, np.int32)  # padding follows the last token: the model is causal
    row[: len(seen)] = seen
    tokens.append(int(next_token(params, row, np.int32(len(seen) - 1), np.int32(i))))
  return np.array(tokens[len(prompt) :], np.int32)
