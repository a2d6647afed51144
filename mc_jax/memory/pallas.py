"""The passes as Pallas TPU kernels: the functions of xla.py, handed to the drivers of mc_jax/kernels."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from mc_jax.kernels import gated_sum, grouped, recurrence, vmem
from mc_jax.memory import aggregate, arithmetic, networks, selection, xla
from mc_jax.memory import documents as documents_lib
from mc_jax.memory.networks import Network, Weights
from mc_jax.memory.rules import Rule, State
from mc_jax.memory.tokens import Tokens


def unsupported(rule: Rule, lengths: tuple[int, ...], q: jax.Array, init: Weights) -> str | None:
  """What the kernels cannot take, for a message; None if they take it all. q [batch, length, heads, head_dim]."""
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"{q.dtype} inputs (bfloat16 and float32 are)"
  if any(length != lengths[0] for length in lengths[:-1]) or lengths[-1] > lengths[0]:
    return "segments of different lengths (segmentation constant has equal ones)"
  chunk, rows = min(rule.chunk, lengths[0]), _rows_of(q.dtype)
  if len(lengths) > 1 and lengths[0] % chunk:
    return f"chunks of {chunk} tokens in segments of {lengths[0]} (the chunk must divide the segment)"
  if len(lengths) > 1 and chunk % rows:
    return f"chunks of {chunk} tokens (a multiple of {rows} is, for {q.dtype})"
  chunk = -(-chunk // rows) * rows
  head_dim = q.shape[-1]
  value_dim = networks.value_dim(rule.network, init, head_dim)
  needed = _vmem(rule, chunk, -(-lengths[0] // chunk), head_dim, value_dim, init)
  if needed > vmem.budget():
    widths = f"head_dim {head_dim}" + (f" and value_dim {value_dim}" if value_dim != head_dim else "")
    return (
      f"rule {rule.name!r} at {widths}, with segments of {lengths[0]} tokens and chunks of {chunk}, on a chip with "
      f"{vmem.budget() >> 20} MiB of VMEM for kernels (they would need some {-(-needed >> 20)})"
    )
  return None


def _rows_of(dtype: jnp.dtype) -> int:
  """Tokens in a tile of a TPU's memory."""
  return 16 if dtype == jnp.bfloat16 else 8


def _vmem(rule: Rule, chunk: int, chunks: int, head_dim: int, value_dim: int, init: Weights) -> int:
  """Bytes that the write's backward kernel takes, which takes the most: estimated, and compiled for in the tests.

  Blocks and scratch are counted. What lives between its instructions was, by the compiler, 25 to 26 arrays of
  [chunk, widest layer] for networks of two layers (head_dim 128 and 256, chunks of 128 and 256).
  """

  def padded(width):
    return -(-width // 128) * 128

  def tiled(w):  # bytes of [1, rows, columns] float32 in tiles of 8 x 128
    return 4 * -(-w.shape[-2] // 8) * 8 * padded(w.shape[-1])

  memory = sum(map(tiled, init.values()))
  fresh = {name: jax.ShapeDtypeStruct((1, *w.shape[1:]), jnp.float32) for name, w in init.items()}
  key = jax.ShapeDtypeStruct((1, 1, chunk, head_dim), jnp.float32)
  state = sum(map(tiled, jax.tree.leaves(jax.eval_shape(rule.start, fresh, key))))
  widest = padded(max(chunk, *(max(w.shape[1:]) for w in init.values())))
  tokens = 4 * chunk * 2 * (padded(head_dim) + padded(value_dim))  # q and k, v and y
  blocks = (3 + chunks) * state + 4 * memory + 2 * 2 * tokens  # those and their gradients, in two buffers
  return blocks + 13 * len(init) * 4 * chunk * widest


@functools.cache
def log_fallback(reason: str) -> None:
  """Says once that XLA runs what the kernels do not support, where there is a TPU to run them."""
  if pltpu.is_tpu_device():
    logging.getLogger(__name__).warning("memory_caching runs without kernels: they do not support %s", reason)


def write(
  rule: Rule,
  fresh: Weights,
  tokens: Tokens,
  lengths: tuple[int, ...],
  *,
  read: xla.Read,
  carries: bool,
  side_by_side: int,
  start: State | None = None,
  interpret: bool = False,
) -> xla.Written:
  """`xla.write` as one kernel: the state stays in VMEM from the first token to the last. Reads are in k's dtype."""
  del side_by_side  # a core runs one segment at a time
  length = sum(lengths)
  rows = _rows_of(tokens.k.dtype)
  chunk = min(rule.chunk, -(-lengths[0] // rows) * rows)
  segment = -(-lengths[0] // chunk) * chunk
  tokens = _pad(tokens, len(lengths) * segment - length)
  tokens = tokens._replace(u=None, token_scores=None)
  marks = None if tokens.documents is None else jax.tree.map(jnp.int32, tokens.documents)

  def step(fresh, state, x, marks):
    if marks is not None:
      x = x._replace(documents=marks._replace(valid=marks.valid != 0))
    state, y = xla.write_chunk(rule, read, fresh, state, x, solve=arithmetic.solve_in_kernel)
    return state, y.astype(x.k.dtype)  # half the way to HBM and back for bfloat16, for one more rounding

  if start is None:
    start = rule.start(fresh, tokens.k)

  def restart(fresh):
    empty = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[2:]), x.dtype), start)
    return empty._replace(memory=fresh)

  run = recurrence.Recurrence(
    step, None if carries else restart, chunk, segment // chunk, f"{rule.name}_write", interpret
  )
  with jax.named_scope("memory_write"):
    y, states, end = recurrence.scan(run, fresh, start, tokens._replace(documents=None), marks)
  return xla.Written(y[:, :, :length], states, end if carries else None)


def read_caches(
  contribution: aggregate.Contribution,
  x: jax.Array,
  gamma: jax.Array,
  memories: Weights,
  lengths: tuple[int, ...],
  counts: np.ndarray | jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """`xla.read_caches` as one kernel, through which the memories stream."""
  if not gamma.shape[-1]:
    return xla.read_caches(contribution, x, gamma, memories, lengths, counts)
  batch, heads, length = x.shape[:3]
  x, memories = x.reshape(batch * heads, length, -1), _rows(memories, x.dtype)
  unread = len(jax.tree.leaves(memories)[0]) - gamma.shape[-1]  # the last memory is read by nobody
  gates = jnp.pad(jnp.moveaxis(gamma, -1, 0), ((0, unread), (0, 0), (0, 0), (0, 0)))
  tile = gated_sum.query_tile(contribution, x, memories)
  ends = np.minimum(np.arange(tile, length + tile, tile), length) - 1
  with jax.named_scope("memory_read"):
    y = gated_sum.gated_sum(
      contribution,
      x,
      gates.reshape(-1, batch * heads, length),
      memories,
      counts[ends],
      tile,
      interpret=interpret,
    )
  return y.reshape(batch, heads, length, -1)


def read_selected(
  network: Network, q: jax.Array, index: jax.Array, gates: jax.Array, states: Weights, *, interpret: bool = False
) -> jax.Array:
  """`selection.read_selected`, every block of pairs read by one kernel that runs the whole network."""
  rows = _rows(states, arithmetic.state_dtype(q.dtype))  # each is fetched once: rounding it first would save nothing
  block = grouped.block_size(aggregate.ReadNetwork(network), q.shape[-1], rows)
  if block is None:
    return selection.read_selected(network, q, index, gates, states)

  # On the average a memory's last block is half full.
  expected = (index.shape[2] * index.shape[3] + len(jax.tree.leaves(rows)[0]) * block // 2) // block

  def read_blocks(x, gates, owner, states):
    x, gates, owner = (a.reshape(-1, *a.shape[2:]) for a in (x, gates, owner))
    with jax.named_scope("memory_read_selected"):
      y = grouped.grouped(
        aggregate.ReadNetwork(network), x, gates, owner, states, expected_blocks=expected, interpret=interpret
      )
    return y.reshape(*q.shape[:2], *y.shape[1:])

  return selection.select_and_read(read_blocks, block, q, index, gates, rows)


def _rows(states: Weights, dtype: jnp.dtype) -> Weights:
  """[n, b, h, in, out] to [n, b * h, in, out], in the dtype that they are multiplied in: half the bytes to fetch."""
  return {name: w.reshape(len(w), -1, *w.shape[-2:]).astype(dtype) for name, w in states.items()}


def _pad(tokens: Tokens, padding: int) -> Tokens:
  """Tokens followed by padding, which changes no state."""
  if not padding:
    return tokens
  number = jnp.zeros((len(tokens.k), 1, tokens.k.shape[2]), jnp.int32)
  documents = tokens.documents or documents_lib.Documents(number, number, number == 0)

  def pad(x, **kwargs):
    return jnp.pad(x, [(0, 0)] * 2 + [(0, padding)] + [(0, 0)] * (x.ndim - 3), **kwargs)

  last = pad(documents.number, mode="edge")
  documents = documents_lib.Documents(
    last, jnp.concatenate([documents.before, last[..., -padding:]], -1), pad(documents.valid)
  )
  gates = {name: pad(gate, constant_values=1) for name, gate in tokens.gates.items()}
  q, k, v, u, token_scores = jax.tree.map(pad, (*tokens[:4], tokens.token_scores))
  return Tokens(q, k, v, u, gates, documents, token_scores)
