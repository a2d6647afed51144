"""A sample of what a model has learned, by full forward passes over a fixed window."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def sample(
  graph: nnx.GraphDef,
  params: dict,
  prompt: np.ndarray,
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
    length: tokens to generate.
    window: tokens in a forward pass.
    temperature: logits are divided by it; 0 takes the likeliest token.
    seed: of the draws.

  Returns:
    The continuation alone, int32 [length].
  """

  @jax.jit
  def next_token(params: dict, tokens: jax.Array, last: jax.Array, key: jax.Array) -> jax.Array:
    logits = nnx.merge(graph, params)(tokens[None])[0, last].astype(jnp.float32)
    if temperature == 0:
      return logits.argmax()
    return jax.random.categorical(key, logits / temperature)

  tokens = [int(token) for token in prompt]
  for key in jax.random.split(jax.random.key(seed), length):
    seen = tokens[-window:]
    row = np.zeros(window, np.int32)  # what follows the last token is padding: the model is causal
    row[: len(seen)] = seen
    tokens.append(int(next_token(params, row, np.int32(len(seen) - 1), key)))
  return np.array(tokens[len(prompt) :], np.int32)
