"""What `tpu_schedule.py` scores of the cached read, by functions without arguments that return (fn, args, flops).

32 rows (batch x heads) of 4096 tokens in segments of 256, so 15 caches, head_dim 128, expansion 4, bfloat16 tokens; the
states in bfloat16, as `mc_jax.memory.fused.read_caches` hands them on.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mc_jax.kernels.gated_sum import gated_sum, query_tile
from mc_jax.memory import networks, online

ROWS, LENGTH, SEGMENT, EXPANSION = 32, 4096, 256, 4
CACHES = LENGTH // SEGMENT - 1
# States that a grid step reads: what gated_sum makes of these shapes, forward and backward.
TOGETHER = {"matrix": (8, 4), "deep": (2, 1)}


def read(network, x, memory):
  return network(x, online.dense(memory, x.dtype)).astype(jnp.float32)


def setting(kind, head_dim, dtype=jnp.bfloat16):
  """(contribution, (x, gates, states), tile, counts) of a memory of this kind; shapes only."""
  network = networks.Matrix() if kind == "matrix" else networks.MLP(2, EXPANSION)
  weights = jax.eval_shape(lambda: network.init(jax.random.key(0), ROWS, head_dim))
  states = jax.tree.map(lambda w: jax.ShapeDtypeStruct((CACHES, *w.shape), dtype), weights)
  x = jax.ShapeDtypeStruct((ROWS, LENGTH, head_dim), jnp.bfloat16)
  gates = jax.ShapeDtypeStruct((CACHES, ROWS, LENGTH), jnp.float32)
  contribution = functools.partial(read, network)
  tile = query_tile(contribution, x, states)
  return contribution, (x, gates, states), tile, np.arange(tile - 1, LENGTH, tile) // SEGMENT


def forward(kind, head_dim):
  contribution, args, tile, counts = setting(kind, head_dim)

  def fn(x, gates, states):
    with jax.named_scope("layer"):  # transformations rename the outermost scope, which else were the kernel
      return gated_sum(contribution, x, gates, states, counts, tile)

  return fn, args, {"cached_read_fwd": TOGETHER[kind][0] * products(args[2], tile)}


def backward(kind, head_dim):
  """Three times the forward: its products again, and two more each for the gradients."""
  fn, args, _ = forward(kind, head_dim)
  _, _, tile, _ = setting(kind, head_dim)

  def gradients(x, gates, states, d_y):
    return jax.vjp(fn, x, gates, states)[1](d_y)

  d_y = jax.ShapeDtypeStruct(args[0].shape, jnp.float32)
  return gradients, (*args, d_y), {"cached_read_bwd": 3 * TOGETHER[kind][1] * products(args[2], tile)}


def products(states, tile):
  """FLOPs of one state's read of a tile, two a multiply-add."""
  return 2 * tile * sum(w.shape[2] * w.shape[3] for w in states.values())


def cached_read_matrix_fwd(head_dim=128):
  return forward("matrix", head_dim)


def cached_read_matrix_bwd(head_dim=128):
  return backward("matrix", head_dim)


def cached_read_deep_fwd(head_dim=128):
  return forward("deep", head_dim)


def cached_read_deep_bwd(head_dim=128):
  return backward("deep", head_dim)
