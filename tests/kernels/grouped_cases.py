"""What `tpu_schedule.py` scores of the selected read, by functions without arguments that return (fn, args, flops).

32 rows (batch x heads) of 4096 tokens that read 2 of 15 caches each, head_dim 128, expansion 4, bfloat16 tokens and
float32 states, as `mc_jax.memory.aggregate.read_selected` has them.
"""

import functools

import jax
import jax.numpy as jnp

from mc_jax.kernels.grouped import block_size, grouped
from mc_jax.memory import networks, online

ROWS, LENGTH, TOP_K, CACHES, EXPANSION = 32, 4096, 2, 15, 4


def read(network, x, memory):
  return network(x, online.dense(memory, x.dtype)).astype(jnp.float32)


def arguments(head_dim, block):
  hidden = EXPANSION * head_dim
  shape = jax.ShapeDtypeStruct
  states = {
    "w1": shape((CACHES, ROWS, head_dim, hidden), jnp.float32),
    "w2": shape((CACHES, ROWS, hidden, head_dim), jnp.float32),
  }
  block = block or block_size(states)
  blocks = LENGTH * TOP_K // block + CACHES  # enough, if the last block of every state is not full
  return shape((ROWS, blocks, block, head_dim), jnp.bfloat16), shape((ROWS, blocks), jnp.int32), states


def flops(x, states):
  """Of a grid step forward: two products, two FLOPs a multiply-add."""
  return 2 * x.shape[2] * sum(w.shape[2] * w.shape[3] for w in states.values())


def selected_read_fwd(head_dim=128, block=None):
  x, owner, states = arguments(head_dim, block)

  def fn(x, owner, states):
    with jax.named_scope("layer"):  # transformations rename the outermost scope, which else were the kernel
      return grouped(functools.partial(read, networks.MLP(2, EXPANSION)), x, owner, states)

  return fn, (x, owner, states), {"selected_read_fwd": flops(x, states)}


def selected_read_bwd(head_dim=128, block=None):
  """Three times the forward: its products again, and two more each for the gradients."""
  fn, (x, owner, states), _ = selected_read_fwd(head_dim, block)

  def gradients(x, owner, states, d_y):
    return jax.vjp(lambda x, states: fn(x, owner, states), x, states)[1](d_y)

  d_y = jax.ShapeDtypeStruct(x.shape, jnp.float32)
  return gradients, (x, owner, states, d_y), {"selected_read_bwd": 3 * flops(x, states)}
