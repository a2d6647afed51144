"""Walking the token axis piece by piece: segments of a sequence, chunks of a segment, query tiles of a read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mc_jax.memory import segments

Pytree = Any
Step = Callable[[Pytree, Pytree, jax.Array], tuple[Pytree, Pytree, Pytree]]


def scan(
  step: Step,
  carry: Pytree,
  tokens: Pytree,
  lengths: tuple[int, ...],
  *,
  last: np.ndarray | jax.Array | None = None,
  together: int = 1,
  remat: bool = False,
  unroll: int = 1,
) -> tuple[Pytree, Pytree, Pytree]:
  """Runs step over consecutive pieces; equal neighbours in one `jax.lax.scan`, so that each length is compiled once.

  Args:
    step: (carry, piece of tokens, index) to (carry, token outputs, state outputs). Token arrays in and
      out are [together * batch, heads, piece length, ...], state arrays [together * batch, ...].
    carry: handed from piece to piece. With together > 1 it must not depend on the pieces.
    tokens: arrays [batch, heads, length, ...] (heads may be 1).
    lengths: the pieces' lengths, adding up to length.
    last: [pieces] int, what step gets as index (of the last piece, for pieces side by side); default 0, 1, ...
    together: pieces that go through step side by side, folded into the batch.
    remat: compute a step again in the backward pass instead of keeping what is inside it.
    unroll: pieces in a scan's body; two save the copies of what is carried between them.

  Returns:
    The last carry; token outputs [batch, heads, length, ...]; state outputs [pieces, batch, ...].
  """
  last = np.arange(len(lengths)) if last is None else last
  token_outputs, state_outputs = [], []
  start = piece = 0
  for length, count in _spans(lengths, together):
    side = min(together, count)
    blocks = count // side

    def cut(x, start=start, blocks=blocks, side=side, length=length):
      x = lax.slice_in_dim(x, start, start + blocks * side * length, axis=2)
      x = x.reshape(*x.shape[:2], blocks, side, length, *x.shape[3:])
      x = jnp.moveaxis(x, (2, 3), (0, 1))  # [blocks, side, batch, heads, length, ...]
      return x.reshape(blocks, side * x.shape[2], *x.shape[3:])

    def join(y, blocks=blocks, side=side):
      y = y.reshape(blocks, side, y.shape[1] // side, *y.shape[2:])
      y = jnp.moveaxis(y, (0, 1), (2, 3))  # [batch, heads, blocks, side, length, ...]
      return y.reshape(*y.shape[:2], blocks * side * y.shape[4], *y.shape[5:])

    def join_states(y, count=count, side=side):
      return y.reshape(count, y.shape[1] // side, *y.shape[2:])

    xs = jax.tree.map(cut, tokens)
    index = last[piece : piece + count].reshape(blocks, side)[:, -1]
    if blocks == 1:
      run = jax.checkpoint(step) if remat else step
      carry, *ys = run(carry, jax.tree.map(lambda x: x[0], xs), index[0])
      ys = jax.tree.map(lambda y: y[None], ys)
    else:
      # Inside a scan nothing can be merged with its recomputation, so the barriers against that are not needed.
      run = jax.checkpoint(step, prevent_cse=False) if remat else step

      def body(carry, xs, run=run):
        carry, *ys = run(carry, *xs)
        return carry, ys

      carry, ys = lax.scan(body, carry, (xs, jnp.asarray(index)), unroll=min(unroll, blocks))
    token_outputs.append(jax.tree.map(join, ys[0]))
    state_outputs.append(jax.tree.map(join_states, ys[1]))
    start += length * count
    piece += count
  token_outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts, 2), *token_outputs)
  return carry, token_outputs, jax.tree.map(lambda *parts: jnp.concatenate(parts, 0), *state_outputs)


def _spans(lengths: tuple[int, ...], together: int) -> list[tuple[int, int]]:
  """(length, count) of runs of equal pieces, cut where the pieces that go side by side do not fill up."""
  spans = []
  for length, count in segments.runs(lengths):
    whole = count - count % together if count > together else count
    spans += [(length, whole)] + [(length, count - whole)] * (count > whole)
  return spans
