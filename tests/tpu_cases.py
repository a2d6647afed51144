"""What a TPU's compiler is asked about the kernels: functions that return (fn, args, {kernel: FLOPs of a grid step}).

Without arguments they are the shapes of docs/kernels.md: batch x heads 32, length 4,096, head_dim 128, expansion 4,
segments (and here chunks) of 256 tokens, bfloat16 inputs, float32 states. FLOPs are of matrix products, two per
multiply-add, those that a backward kernel computes again included.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mc_jax.memory import aggregate, fused, online, passes, rules, segments

BATCH, HEADS, LENGTH, SEGMENT, EXPANSION = 4, 8, 4096, 256, 4


def array(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def write(rule, head_dim, *, carries=True):
  """The write pass: (function of M_0 and tokens, its arguments)."""
  vector = array(BATCH, HEADS, LENGTH, head_dim, dtype=jnp.bfloat16)
  gates = {name: array(BATCH, HEADS, LENGTH) for name in rule.gates}
  fresh = jax.eval_shape(functools.partial(rule.init, heads=HEADS, head_dim=head_dim), jax.random.key(0))

  def read(memory, x):
    return rule.network(x, lambda name, z: online.read(memory, name, z, jnp.bfloat16))

  def fn(fresh, tokens):
    lengths = segments.constant(SEGMENT).lengths(LENGTH)
    written = fused.write(rule, fresh, tokens, lengths, read=read, carries=carries, side_by_side=1)
    return written.y, written.states.memory

  return fn, (fresh, passes.Tokens(vector, vector, vector, None, gates, None))


def write_flops(rule, head_dim):
  """Of a chunk's step forward."""
  t, d = rule.chunk, head_dim
  if rule.name == "linear":
    layers, inner, coefficients = [(d, d)], 0, 0
  else:
    layers, inner = [(d, EXPANSION * d), (EXPANSION * d, d)], 3 * t * EXPANSION * d * d  # k W1, z W2, delta W2^T
    coefficients = t**3  # C = P Q B
  states = 2 if rule.momentum else 1
  reads = sum(states * t * a * b + t * t * (a + b) for a, b in layers)  # x W_0, x S_0, (C * x z^T) delta
  writes = sum(states * t * a * b for a, b in layers)  # z^T delta
  return 2 * (inner + reads + writes + coefficients)


def forward(rule, head_dim):
  fn, args = write(rule, head_dim)
  return fn, args, {f"{rule.name}_write_fwd": write_flops(rule, head_dim)}


def backward(rule, head_dim):
  """Every product again, and two more for its gradients; what only steps forward to later chunks is not counted."""
  fn, args = write(rule, head_dim)
  out = jax.eval_shape(fn, *args)

  def gradients(args, cotangent):
    return jax.vjp(fn, *args)[1](cotangent)

  return gradients, (args, out), {f"{rule.name}_write_bwd": 3 * write_flops(rule, head_dim)}


def titans_write_fwd(head_dim=128, chunk=256):
  return forward(rules.titans(chunk=chunk), head_dim)


def titans_write_bwd(head_dim=128, chunk=256):
  return backward(rules.titans(chunk=chunk), head_dim)


def linear_write_fwd(head_dim=128, chunk=256):
  return forward(rules.linear(chunk=chunk), head_dim)


def linear_write_bwd(head_dim=128, chunk=256):
  return backward(rules.linear(chunk=chunk), head_dim)
