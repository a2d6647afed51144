"""The arithmetic that chunk steps are made of, the same in XLA and in kernels: products, decays, triangular systems.

States and what decides (decays, scores, softmax) are at least float32, whatever the tokens' dtype is. In kernels and
their gradients there is nothing but products, so unit lower triangular systems, (I + n) x = r with n strictly lower
triangular, are solved by them: the errors of a chunk's tokens, each of which depends on what the tokens before it
wrote.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.memory.networks import Linear, Weights

Solve = Callable[[jax.Array, jax.Array], jax.Array]


def state_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """States, decays, scores and softmax are at least float32, whatever the inputs are."""
  return jnp.promote_types(dtype, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """a @ b with operands rounded to the compute dtype and an accumulator of at least float32, in its gradient too.

  bfloat16 operands are one pass of a TPU's matrix unit. float32 ones are multiplied as float32 (six passes): left to
  their defaults, XLA and Mosaic would round them to bfloat16 without a word.
  """
  precision = jax.lax.Precision.DEFAULT if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
  a, b = a.astype(dtype), b.astype(dtype)
  if a.ndim < b.ndim:  # XLA:CPU fails on one transposed bfloat16 matrix for many: "BF16 x BF16 = F32" unimplemented
    a = jnp.broadcast_to(a, (*b.shape[:-2], *a.shape[-2:]))
  return jnp.matmul(a, b, precision=precision, preferred_element_type=state_dtype(dtype))


def _product_forward(a, b, dtype):
  # Only the gradients that are asked for are made: what the other operand would be needed for is empty. But there are
  # always as many residuals, and none is an operand as it came, for JAX may count those of one trace for another's.
  def kept(x, wanted):
    return x.value.astype(dtype)[None] if wanted else jnp.empty((0, *x.value.shape), dtype)

  def like(x):  # an empty array remembers what shape and dtype a gradient must have
    return jnp.empty((*x.value.shape, 0), x.value.dtype)

  return product(a.value, b.value, dtype), (kept(b, a.perturbed), like(a), kept(a, b.perturbed), like(b))


def _product_backward(dtype, residuals, cotangent):
  def gradient(x, y, like):
    return _sum_to(product(x, y, dtype), like.shape[:-1]).astype(like.dtype)

  b, like_a, a, like_b = residuals
  return (
    gradient(cotangent, jnp.swapaxes(b[0], -1, -2), like_a) if len(b) else None,
    gradient(jnp.swapaxes(a[0], -1, -2), cotangent, like_b) if len(a) else None,
  )


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Sums over the axes along which an array of `shape` was broadcast to x's."""
  x = x.sum(tuple(range(x.ndim - len(shape))))
  return x.sum([i for i, (n, to) in enumerate(zip(x.shape, shape, strict=True)) if n != to], keepdims=True)


def dense(weights: Weights, dtype: jnp.dtype) -> Linear:
  """Reads a plain state: linear(name, x) = x @ W."""
  return lambda name, x: product(x, weights[name], dtype)


def gram(x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """<x_t, y_j>: [..., T, in], [..., J, in] to [..., T, J]."""
  return product(x, jnp.swapaxes(y, -1, -2), dtype)


def square(x: jax.Array) -> jax.Array:
  """Squared lengths: [..., n] to [..., 1]."""
  return jnp.square(x).sum(-1, keepdims=True)


def weighed(weights: jax.Array | None, x: jax.Array, w: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """weights_t x_t W, weighing the narrower of x and the product: weights [..., T, 1], x [..., T, in], W [..., in, out].

  Not the product where both are as wide: its gradient would need it again.
  """
  if weights is None:
    return product(x, w, dtype)
  if w.shape[-1] < w.shape[-2]:
    return weights * product(x, w, dtype)
  return product(weights * x, w, dtype)


class Decays(NamedTuple):
  """Products of a gate over tokens r, inside each document: total over r <= t [..., T], since over i < r <= t
  [..., T, T]."""

  total: jax.Array
  since: jax.Array


def decays(gate: jax.Array | None, same: jax.Array, dtype: jnp.dtype) -> Decays:
  """The products at each token t; gate [..., T], None for 1.

  From differences of cumulative logs, masked BEFORE the exponential: ratios of products, or masking after it, are inf
  and NaN within 256 tokens in float32.
  """
  if gate is None:
    return Decays(None, same.astype(dtype))
  logs = masked_sums(same, log(gate))
  return Decays(jnp.exp(logs), jnp.exp(jnp.where(same, column(logs) - logs[..., None, :], -jnp.inf)))


def totals(gate: jax.Array, seen: jax.Array) -> jax.Array:
  """The products of a gate [..., T] over the tokens that each token sees, [..., T, T] bool: [..., T]."""
  return jnp.exp(masked_sums(seen, log(gate)))


def total(gate: jax.Array) -> jax.Array:
  """The product of a gate over all tokens: [..., T] to [...]."""
  return jnp.exp(log(gate).sum(-1))


def log(gate: jax.Array) -> jax.Array:
  """log of a gate, that of the smallest normal number where it is 0."""
  return jnp.log(jnp.maximum(gate, jnp.finfo(gate.dtype).tiny))


@jax.custom_vjp
def column(x: jax.Array) -> jax.Array:
  """[..., T] to [..., T, 1]; on a TPU a number per token goes from lanes to sublanes.

  Not every TPU has an instruction for the way back, but all can transpose.
  """
  return x[..., None]


column.defvjp(
  lambda x: (column(x), None),
  lambda _, g: (jnp.swapaxes(jnp.broadcast_to(g, (*g.shape[:-1], 128)), -1, -2)[..., 0, :],),
)


@jax.custom_vjp
def masked_sums(mask: jax.Array, x: jax.Array) -> jax.Array:
  """sum_j mask_tj x_j to x's full precision: mask [..., T, T] bool, x [..., T] to [..., T]."""
  return _exact_product(x, jnp.swapaxes(mask, -1, -2))


masked_sums.defvjp(
  lambda mask, x: (masked_sums(mask, x), mask), lambda mask, cotangent: (None, _exact_product(cotangent, mask))
)


@jax.custom_vjp
def masked_vector_sums(mask: jax.Array, x: jax.Array) -> jax.Array:
  """sum_j mask_tj x_j of vectors, to x's full precision: mask [..., T, T] bool, x [..., T, d] to [..., T, d]."""
  if x.dtype != jnp.float32:
    return product(mask, x, x.dtype)
  return functools.reduce(jnp.add, (product(mask, part, jnp.bfloat16) for part in _bfloat16_parts(x)))


masked_vector_sums.defvjp(
  lambda mask, x: (masked_vector_sums(mask, x), mask),
  lambda mask, cotangent: (None, masked_vector_sums(jnp.swapaxes(mask, -1, -2), cotangent)),
)


def _exact_product(x: jax.Array, mask: jax.Array) -> jax.Array:
  """x @ mask: [..., T] and [..., T, T] bool to [..., T].

  One pass of a TPU's matrix unit multiplies the parts by the mask.
  """
  if x.dtype != jnp.float32:
    return product(x[..., None, :], mask, x.dtype)[..., 0, :]
  return product(jnp.stack(_bfloat16_parts(x), -2), mask, jnp.bfloat16).sum(-2)


def _bfloat16_parts(x: jax.Array) -> list[jax.Array]:
  """float32 numbers as the sums of three that bfloat16 holds, each of the next 8 bits."""
  parts = []
  for _ in range(3):
    parts.append(truncated(x))
    x -= parts[-1]
  return parts


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def shifted(x: jax.Array, back: bool = False) -> jax.Array:
  """The rows of x [..., T, J] one place further on, or back, with zeros in the place that is left.

  (The transpose of a slice pads by less than nothing, which TPU kernels cannot.)
  """
  nothing = jnp.zeros_like(x[..., :1, :])
  return jnp.concatenate([x[..., 1:, :], nothing] if back else [nothing, x[..., :-1, :]], -2)


shifted.defvjp(lambda x, back: (shifted(x, back), None), lambda back, _, g: (shifted(g, not back),))


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fine_product(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """`product` of float32 operands that are not rounded to bfloat16, if that is the dtype, but to some 2^-16; its
  gradients are product's."""
  return _fine_product(a, b) if dtype == jnp.bfloat16 else product(a, b, dtype)


fine_product.defvjp(
  lambda a, b, dtype: (fine_product(a, b, dtype), (a, b)),
  lambda dtype, operands, g: jax.vjp(lambda a, b: product(a, b, dtype), *operands)[1](g),
)


def truncated(x: jax.Array) -> jax.Array:
  """The float32 number's first 8 bits; not by rounding: XLA may drop conversions there and back."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _plain_product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


# A TPU's matrix unit is filled by 64 rows, and multiplies bfloat16. On a CPU smaller blocks are faster, and bfloat16
# parts slower than the product that they replace (python -m mc_jax.bench.layer --rules=titans).
_TPU, _PLAIN = By(64, _fine_product), By(16, _plain_product)
