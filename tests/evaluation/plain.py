"""The plain forward pass, one sequence at a time: what batches of continuations must agree with."""

import functools

import jax
import numpy as np
from flax import nnx


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, params, tokens):
  return nnx.merge(graph, params)(tokens)


def logits(subject, ids, row=64):
  """[len(ids), vocab_size] of what follows each of the ids, which stand at the start of a row."""
  tokens = np.zeros((1, row), np.int32)
  tokens[0, : len(ids)] = ids
  return np.asarray(_logits(subject.graph, subject.params, tokens))[0, : len(ids)].astype(np.float64)


def likelihood(subject, context, continuation):
  """(log p(continuation | context) in nats, whether each token is the likeliest)."""
  ids = np.concatenate([context, continuation]).astype(int)
  found = logits(subject, ids[:-1])[len(context) - 1 :]
  log_p = found - np.log(np.sum(np.exp(found), axis=-1, keepdims=True))
  right = found.argmax(-1) == ids[len(context) :]
  return float(sum(log_p[np.arange(len(right)), ids[len(context) :]])), bool(right.all())


def greedy(subject, context, count):
  """The likeliest next tokens, one after the other."""
  ids = list(context)
  for _ in range(count):
    ids.append(int(logits(subject, ids)[-1].argmax()))
  return ids[len(context) :]
