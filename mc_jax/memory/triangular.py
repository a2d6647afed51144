"""Unit lower triangular systems, solved by matrix products alone: in kernels and their gradients there is nothing else.

(I + n) x = r, n strictly lower triangular: the errors of a chunk's tokens, each of which depends on what the tokens
before it wrote (online.py).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class By(NamedTuple):
  """How a machine solves: tokens whose errors are solved for together, and then substituted into the next ones'; and
  its matrix products."""

  block: int
  product: Callable[[jax.Array, jax.Array], jax.Array]


def solve(n: jax.Array, r: jax.Array) -> jax.Array:
  """x of (I + n) x = r, n [..., T, T] strictly lower triangular, r [..., T, d]; by products alone.

  The diagonal's blocks are inverted, and block after block is substituted. On TPUs the products of float32 are those of
  two bfloat16 parts, three of the four: 2^-16, where one part would leave 2^-8. Elsewhere they are plain.
  """
  return _solve(n, r, _anywhere)


def solve_in_kernel(n: jax.Array, r: jax.Array) -> jax.Array:
  """`solve` as on a TPU, whatever the platform: what a kernel is made of."""
  return _solve(n, r, _on_tpu)


def _anywhere(run, *arrays):
  return jax.lax.platform_dependent(*arrays, tpu=run(_TPU), default=run(_PLAIN))


def _on_tpu(run, *arrays):
  return run(_TPU)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _solve(n, r, on):
  return on(lambda by: functools.partial(_substitute, by, transposed=False), n, r)


def _solve_forward(n, r, on):
  x = _solve(n, r, on)
  return x, (n, x)


def _solve_backward(on, residuals, cotangent):
  def gradients(by, n, x, cotangent):
    r = _substitute(by, n, cotangent, transposed=True)
    return -by.product(r, jnp.swapaxes(x, -1, -2)), r

  return on(lambda by: functools.partial(gradients, by), *residuals, cotangent)


_solve.defvjp(_solve_forward, _solve_backward)


def _substitute(by: By, n: jax.Array, r: jax.Array, *, transposed: bool) -> jax.Array:
  """(I + n)^-1 r, or with the transposed matrix."""
  length = n.shape[-1]
  blocks = [slice(first, min(first + by.block, length)) for first in range(0, length, by.block)]

  def part(i, j):
    return jnp.swapaxes(n[..., blocks[j], blocks[i]], -1, -2) if transposed else n[..., blocks[i], blocks[j]]

  inverses = _inverses(by, [n[..., block, block] for block in blocks])
  found = {}
  for i in reversed(range(len(blocks))) if transposed else range(len(blocks)):
    here = r[..., blocks[i], :]
    for j, x in found.items():
      here -= by.product(part(i, j), x)
    found[i] = by.product(jnp.swapaxes(inverses[i], -1, -2) if transposed else inverses[i], here)
  return jnp.concatenate([found[i] for i in range(len(blocks))], -2) if len(blocks) > 1 else found[0]


def _inverses(by: By, blocks: list[jax.Array]) -> list[jax.Array]:
  """(I + n)^-1 of each n [..., T, T] strictly lower triangular, by block doubling: blocks of 1, 2, 4 ... are merged.

  [[X, 0], [C, Y]]^-1 = [[X^-1, 0], [-Y^-1 C X^-1, Y^-1]]. The identity (I - n)(I + n^2)(I + n^4) ... is cheaper, but
  forms powers, and where keys repeat its errors reach 1e29. All blocks take a level together: none waits for another.
  """
  found, lengths = [], [n.shape[-1] for n in blocks]
  for n, length in zip(blocks, lengths, strict=True):
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    found.append(jnp.broadcast_to((row == column).astype(n.dtype), n.shape))
  for level in range((max(lengths) - 1).bit_length()):
    steps = [_below(n, level) for n in blocks]
    if level == 0:
      found = [x - step for x, step in zip(found, steps, strict=True)]
    else:
      moved = [by.product(x, step) for x, step in zip(found, steps, strict=True)]
      found = [x - by.product(move, x) for x, move in zip(found, moved, strict=True)]
  return found


def _below(n: jax.Array, level: int) -> jax.Array:
  """The parts of n below the diagonal by which pairs of blocks of 2^level become one."""
  row, column = (jax.lax.broadcasted_iota(jnp.int32, n.shape[-2:], axis) >> level for axis in (0, 1))
  return jnp.where((row % 2 == 1) & (column == row - 1), n, 0.0)


def _fine_product(a: jax.Array, b: jax.Array) -> jax.Array:
  """a @ b; of float32 to some 2^-16 of |a| |b|, by three passes of a TPU's matrix unit where product takes six."""
  if a.dtype != jnp.float32:
    return jnp.matmul(a, b)

  def parts(x):
    high = truncated(x)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)

  def matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)

  (a, a_rest), (b, b_rest) = parts(a), parts(b)
  return matmul(a, b) + (matmul(a, b_rest) + matmul(a_rest, b))


def truncated(x: jax.Array) -> jax.Array:
  """The float32 number's first 8 bits; not by rounding: XLA may drop conversions there and back."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _plain_product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


# A TPU's matrix unit is filled by 64 rows, and multiplies bfloat16. On a CPU at the quickstart's size blocks of 16 take
# two thirds of the time of 64, and bfloat16 parts would take as long again.
_TPU, _PLAIN = By(64, _fine_product), By(16, _plain_product)
