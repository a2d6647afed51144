"""Reading all cached memories across devices: states go to the queries, or queries to the states.

Both give every device the same work, though the last part of a sequence reads twice the mean: the ends of early and
late parts change places first (`Parts.mirrored`), where tokens, or a part's memories, are an even number. Both go in
steps, in none of which a device gathers more than `Parts.buffer` bytes; a step is done again in the backward pass, so
that nothing gathered is kept.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mc_jax.memory.aggregate import Contribution
from mc_jax.memory.arithmetic import state_dtype
from mc_jax.memory.networks import Weights
from mc_jax.parallel.parts import Parts, gather_rounded, largest_divisor, nbytes


def read_caches(
  parts: Parts,
  local: Callable[..., jax.Array],
  contribution: Contribution,
  x: jax.Array,
  gamma: jax.Array,
  memories: Weights,
  lengths: tuple[int, ...],
  counts: jax.Array,
) -> jax.Array:
  """`xla.read_caches` of the queries here, x [b, h, length, in], over all parts' memories, {name: [n, b, h, ...]}.

  gamma [b, h, length, count * n - 1] and counts are those of the whole sequence's caches. `local` is
  `xla.read_caches` of what is here.
  """
  gamma = jnp.pad(gamma, ((0, 0), (0, 0), (0, 0), (0, 1)))  # the sequence's last state is read by nobody
  to_queries, to_states = traffic(parts, contribution, x, memories)
  read = _states_to_queries if to_queries <= to_states else _queries_to_states
  return read(parts, local, contribution, x, gamma, memories, lengths, counts)


def traffic(parts: Parts, contribution: Contribution, x: jax.Array, memories: Weights) -> tuple[int, int]:
  """Bytes that reach a device in the forward pass if states go to the queries, and if queries go to the states."""
  leaves = list(memories.values())
  out = _answers(contribution, x, memories)
  wide, others = jnp.dtype(out.dtype).itemsize, parts.count - 1
  caches = parts.count * len(leaves[0])
  gates = x.size // x.shape[-1] * caches * wide
  queries, answers, states = nbytes([x], x.dtype), out.size * wide, nbytes(leaves, x.dtype)
  to_queries = others * states + (queries + answers + gates) // 2
  to_states = others * (queries + answers) + gates + (states // 2 if _balanced(leaves) else 0)
  return to_queries, to_states


def _answers(contribution: Contribution, x: jax.Array, memories: Weights) -> jax.ShapeDtypeStruct:
  return jax.eval_shape(lambda x, memories: contribution(x, {name: w[0] for name, w in memories.items()}), x, memories)


def _balanced(leaves: list[jax.Array]) -> bool:
  return len(leaves[0]) % 2 == 0


def _states_to_queries(parts, local, contribution, x, gamma, memories, lengths, counts):
  n = len(next(iter(memories.values())))
  even = x.shape[2] % 2 == 0
  if even:
    x, gamma, counts = parts.mirrored(x, 2), parts.mirrored(gamma, 2), parts.mirrored(counts, 0)
    if len(lengths) % 2:  # query tiles are made of one half or the other
      lengths = (lengths[0] // 2,) * (2 * len(lengths))
  dtype, x = x.dtype, x.astype(state_dtype(x.dtype))  # rounded in each step: gradients add up in what is kept here
  one = nbytes([w[0] for w in memories.values()], dtype)
  together = largest_divisor(n, parts.buffer / (parts.count * one))
  steps = n // together
  # [steps, b, h, length, count * together]: the gates of the memories that a step gathers, in the sequence's order.
  gamma = jnp.moveaxis(gamma.reshape(*gamma.shape[:3], parts.count, steps, together), 4, 0)
  gamma = gamma.reshape(*gamma.shape[:4], -1)
  memories = {name: w.reshape(steps, together, *w.shape[1:]) for name, w in memories.items()}
  out = _answers(contribution, x, {name: w[0] for name, w in memories.items()})

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def step(total, xs):
    i, gamma, memories = xs
    memories = {name: gather_rounded(w, parts.axis, dtype) for name, w in memories.items()}
    memories = {name: w.reshape(-1, *w.shape[2:]) for name, w in memories.items()}
    starts = jnp.arange(parts.count)[:, None] * n + i * together
    read = jnp.clip(counts - starts, 0, together).sum(0)
    return total + local(contribution, x.astype(dtype), gamma, memories, lengths, read), None

  total = jnp.zeros(out.shape, out.dtype)
  y, _ = lax.scan(step, total, (jnp.arange(steps), gamma, memories))
  return parts.unmirrored(y, 2) if even else y


def _queries_to_states(parts, local, contribution, x, gamma, memories, lengths, counts):
  leaves = list(memories.values())
  n, length, wide = len(leaves[0]), x.shape[2], state_dtype(x.dtype)
  # Who has which memories: pieces of the sequence's, in order.
  pieces = 1
  owned = np.arange(parts.count)[:, None]
  if _balanced(leaves):
    pieces, owned = 2, parts.halves()
    # Sent rounded; kept wide, for their gradients add up over the steps.
    memories = {name: parts.mirrored(w.astype(x.dtype), 0).astype(wide) for name, w in memories.items()}
  size = n // pieces
  out = _answers(contribution, x, memories)
  token = (nbytes([x], x.dtype) + nbytes([out], wide)) // length + x.shape[0] * x.shape[1] * n * jnp.dtype(
    wide
  ).itemsize
  together = largest_divisor(length, parts.buffer / (parts.count * token), multiple_of=128)
  steps = length // together
  lengths = (together,) * parts.count

  def cut(x):  # [b, h, length, ...] to [steps, b, h, together, ...]
    return jnp.moveaxis(x.reshape(*x.shape[:2], steps, together, *x.shape[3:]), 2, 0)

  def side_by_side(x):  # [count, b, h, together, ...] to [b, h, count * together, ...]
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def step(_, xs):
    x, gamma, counts = xs
    gamma = gamma.reshape(*gamma.shape[:3], -1, size)[..., owned, :]  # [b, h, together, count, pieces, size]
    gamma = jnp.moveaxis(gamma.reshape(*gamma.shape[:4], n), 3, 0)
    gamma = side_by_side(lax.all_to_all(gamma, parts.axis, 0, 0, tiled=True))
    x = side_by_side(gather_rounded(x, parts.axis, x.dtype))
    starts = jnp.asarray(owned)[parts.index()][:, None] * size
    read = jnp.clip(lax.all_gather(counts, parts.axis, tiled=True) - starts, 0, size).sum(0)
    y = local(contribution, x, gamma, memories, lengths, read)
    y = y.reshape(*y.shape[:2], parts.count, together, y.shape[-1])
    return None, lax.psum_scatter(y, parts.axis, scatter_dimension=2, tiled=False)

  _, y = lax.scan(step, None, (cut(x), cut(gamma), counts.reshape(steps, together)))
  y = jnp.moveaxis(y, 0, 2)
  return y.reshape(*y.shape[:2], length, y.shape[-1])
