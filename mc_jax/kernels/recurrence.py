"""`jax.lax.scan` of a step over chunks of tokens, as one Pallas TPU kernel whose carry stays in VMEM.

The step is handed in and traced into the kernel as it is; the backward kernel takes `jax.vjp` of it. Chunks make
segments. The carry at every segment's end is an output, and is all that the backward pass keeps: it steps through a
segment's earlier chunks again, leaving their carries in VMEM, before it goes back over them.

A grid step is one chunk of one head, and arrays inside the functions have a leading axis of 1 for it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mc_jax.kernels import cost, vmem

Pytree = Any


@dataclasses.dataclass(frozen=True)
class Recurrence:
  """What runs.

  Attributes:
    step: (constants, carry, tokens, marks) to (carry, outputs), one chunk.
    start: constants to carry, what every segment starts with; None: with the carry of the one before.
    chunk: tokens of a chunk.
    chunks: chunks of a segment.
    name: the kernels are called name_fwd and name_bwd.
    interpret: as in `pl.pallas_call`.
  """

  step: Callable[[Pytree, Pytree, Pytree, Pytree], tuple[Pytree, Pytree]]
  start: Callable[[Pytree], Pytree] | None
  chunk: int
  chunks: int
  name: str = "recurrence"
  interpret: Any = False


def scan(
  recurrence: Recurrence, constants: Pytree, initial: Pytree, tokens: Pytree, marks: Pytree = ()
) -> tuple[Pytree, Pytree, Pytree]:
  """Steps through all chunks of all segments.

  Args:
    recurrence: what runs.
    constants: arrays [heads, ...].
    initial: the carry that comes into the first segment, arrays [batch, heads, ...], the dots at least one axis.
    tokens: floating-point arrays [batch, heads, length] or [batch, heads, length, d]; whole segments.
    marks: integer arrays [batch, 1, length], which no gradient is taken of.

  Returns:
    Outputs, arrays like tokens; the carry at every segment's end, arrays [segments, batch, heads, ...]; and the last
    of these, [batch, heads, ...], for those who want no other: a gradient in it alone is no array for all segments.
  """

  def chunks(x):
    return x.reshape(*x.shape[:2], -1, 1, recurrence.chunk, *x.shape[3:])

  constants = jax.tree.map(lambda x: x[:, None], constants)
  initial = jax.tree.map(lambda x: x[:, :, None], initial)
  tokens, marks = jax.tree.map(chunks, (tokens, marks))
  y, ends, last = _scan(recurrence, constants, initial, tokens, marks)
  y = jax.tree.map(lambda x: x.reshape(*x.shape[:2], x.shape[2] * x.shape[4], *x.shape[5:]), y)
  return y, jax.tree.map(lambda x: x.squeeze(3), ends), jax.tree.map(lambda x: x.squeeze(2), last)


# Inside, every array is [*where, 1, ...], `where` being what the grid step picks one of:
# constants [heads], carries [batch, heads], ends [segments, batch, heads], tokens [batch, heads, chunks].


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(recurrence, constants, initial, tokens, marks):
  step, fresh, chunks = recurrence.step, recurrence.start, recurrence.chunks
  batch, heads, length = jax.tree.leaves(tokens)[0].shape[:3]
  segments = length // chunks
  blocks = _blocks(constants, 1), _blocks(initial, 2), _blocks(tokens, 3), _blocks(marks, 3)
  _, y = jax.eval_shape(step, *blocks)

  def kernel(constants, initial, tokens, marks, outputs, ends, carry):
    row, segment, chunk = (pl.program_id(0), pl.program_id(1)), pl.program_id(2), pl.program_id(3)
    constants = _load(constants)

    @pl.when((segment == 0) & (chunk == 0))
    def _():
      jax.tree.map(lambda source, ref: pltpu.sync_copy(source.at[row], ref), initial, carry)

    start = _load(carry)
    if fresh is not None:
      start = jax.tree.map(functools.partial(jnp.where, chunk == 0), fresh(constants), start)
    end, y = step(constants, start, _load(tokens), _load(marks))
    _store(outputs, y)
    _store(carry, end)

    @pl.when(chunk == chunks - 1)
    def _():
      _store(ends, end)

  def here(b, h, s, c):
    return b, h, s * chunks + c

  out_shape = _arrays(y, batch, heads, length), _arrays(blocks[1], segments, batch, heads)
  call = pl.pallas_call(
    kernel,
    grid=(batch, heads, segments, chunks),
    in_specs=(
      _specs(blocks[0], lambda b, h, s, c: (h,), buffers=1),
      _whole(initial),
      _specs(blocks[2], here),
      _specs(blocks[3], lambda b, h, s, c: (b, 0, s * chunks + c)),
    ),
    out_shape=out_shape,
    out_specs=(_specs(y, here), _specs(blocks[1], lambda b, h, s, c: (s, b, h))),
    scratch_shapes=(_scratch(blocks[1]),),
    cost_estimate=_cost(
      [(batch * heads * length, step, blocks)],
      [(1, (initial, tokens, out_shape)), (batch, constants), (heads, marks)],
    ),
    **_parameters(recurrence, "fwd"),
  )
  y, ends = sequential_vmap(call)(constants, initial, tokens, marks)
  return y, ends, jax.tree.map(lambda x: x[-1], ends)


def _scan_forward(recurrence, *args):
  args = jax.tree.map(lambda x: x.value, args, is_leaf=lambda x: hasattr(x, "perturbed"))
  out = _scan(recurrence, *args)
  return out, (*args, out[1] if recurrence.start is None else ())


def _scan_backward(recurrence, residuals, cotangents):
  step, fresh, chunks = recurrence.step, recurrence.start, recurrence.chunks
  constants, initial, tokens, marks, ends = residuals
  batch, heads, length = jax.tree.leaves(tokens)[0].shape[:3]
  segments = length // chunks
  blocks = _blocks(constants, 1), _blocks(initial, 2), _blocks(tokens, 3), _blocks(marks, 3)
  _, y = jax.eval_shape(step, *blocks)
  # What nothing was made of, such as a momentum at a segment's end, has no cotangent to fetch.
  d_outputs, d_ends, d_last = (
    [None if isinstance(x, SymbolicZero) else x for x in jax.tree.leaves(c)] for c in cotangents
  )
  last = chunks - 1

  def kernel(*refs):
    """Phases 0 .. last - 1 step forwards through the chunks, phases last .. 2 last come back."""
    constants, initial, ends, tokens, marks, d_outputs, d_ends, d_last = refs[:8]
    d_constants, d_initial, d_tokens, starts, d_carry = refs[8:]
    row, segment, phase = (pl.program_id(0), pl.program_id(1)), segments - 1 - pl.program_id(2), pl.program_id(3)
    constants, marks = _load(constants), _load(marks)

    @pl.when((segment == segments - 1) & (phase == 0))
    def _():
      for ref, d in zip(jax.tree.leaves(d_carry), d_last, strict=True):
        if d is None:
          ref[...] = jnp.zeros_like(ref)
        else:
          pltpu.sync_copy(d.at[row], ref)
      _store(d_constants, jax.tree.map(jnp.zeros_like, constants))

    if fresh is None:

      @pl.when((phase == 0) & (segment == 0))
      def _():
        jax.tree.map(lambda source, ref: pltpu.sync_copy(source.at[row], ref.at[0]), initial, starts)

      @pl.when((phase == 0) & (segment > 0))
      def _():
        _store(starts, _load(ends), 0)

    else:

      @pl.when(phase == 0)
      def _():
        _store(starts, fresh(constants), 0)

    if chunks > 1:

      @pl.when(phase < last)
      def _():
        end, _ = step(constants, _load(starts, phase), _load(tokens), marks)
        _store(starts, end, phase + 1)

    @pl.when(phase == last)
    def _():
      leaves = jax.tree.leaves(d_carry)
      _store(leaves, [x[...] if d is None else x[...] + d[...] for x, d in zip(leaves, d_ends, strict=True)])

    @pl.when(phase >= last)
    def _():
      (_, outputs), pull = jax.vjp(
        lambda *args: step(*args, marks), constants, _load(starts, 2 * last - phase), _load(tokens)
      )
      leaves, tree = jax.tree.flatten(outputs)
      d_y = [jnp.zeros_like(x) if d is None else d[...] for x, d in zip(leaves, d_outputs, strict=True)]
      d_c, d_start, d_x = pull((_load(d_carry), tree.unflatten(d_y)))
      _add(d_constants, d_c)
      _store(d_carry, d_start)
      _store(d_tokens, d_x)

    if fresh is not None:

      @pl.when(phase == 2 * last)
      def _():
        _add(d_constants, jax.vjp(fresh, constants)[1](_load(d_carry))[0])
        _store(d_carry, jax.tree.map(jnp.zeros_like, _load(d_carry)))

    @pl.when((phase == 2 * last) & (segment == 0))
    def _():
      jax.tree.map(lambda ref, target: pltpu.sync_copy(ref, target.at[row]), d_carry, d_initial)

  def on_the_way(b, h, s, p):
    return b, h, (segments - 1 - s) * chunks + jnp.minimum(p, 2 * last - p)

  def on_the_way_back(b, h, s, p):
    return b, h, (segments - 1 - s) * chunks + jnp.minimum(last, 2 * last - p)

  def row(b, h, s, p):
    return b, h

  wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.promote_types(x.dtype, jnp.float32)), blocks[0])
  d_y = [None if d is None else x for x, d in zip(jax.tree.leaves(y), d_outputs, strict=True)]
  d_e = [None if d is None else x for x, d in zip(jax.tree.leaves(blocks[1]), d_ends, strict=True)]
  inputs = constants, initial, ends, tokens, marks, d_outputs, d_ends, d_last
  out_shape = _arrays(wide, batch, heads), _arrays(blocks[1], batch, heads), _arrays(blocks[2], batch, heads, length)

  def back(constants, carry, tokens, marks):
    out, pull = jax.vjp(lambda *args: step(*args, marks), constants, carry, tokens)
    return pull(out)

  call = pl.pallas_call(
    kernel,
    grid=(batch, heads, segments, 2 * chunks - 1),
    in_specs=(
      _specs(blocks[0], lambda b, h, s, p: (h,), buffers=1),
      _whole(initial),
      () if fresh else _specs(blocks[1], lambda b, h, s, p: (jnp.maximum(segments - 2 - s, 0), b, h)),
      _specs(blocks[2], on_the_way),
      _specs(blocks[3], lambda b, h, s, p: (b, 0, on_the_way(b, h, s, p)[2])),
      _specs(d_y, on_the_way_back),
      _specs(d_e, lambda b, h, s, p: (segments - 1 - s, b, h)),
      _whole(d_last),
    ),
    out_shape=out_shape,
    out_specs=(_specs(wide, row, buffers=1), _whole(initial), _specs(blocks[2], on_the_way_back)),
    scratch_shapes=(_scratch(blocks[1], chunks), _scratch(blocks[1])),
    cost_estimate=_cost(
      [
        (batch * heads * segments * last, lambda *args: step(*args)[0], blocks),
        (batch * heads * length, back, blocks),
      ],
      [
        (1, (initial, ends, d_outputs, d_ends, d_last, out_shape)),
        (batch, constants),
        (1 + last / chunks, tokens),
        ((1 + last / chunks) * heads, marks),
      ],
    ),
    **_parameters(recurrence, "bwd"),
  )
  d_constants, d_initial, d_tokens = sequential_vmap(call)(*inputs)
  d_constants = jax.tree.map(lambda d, x: d.sum(0).astype(x.dtype), d_constants, constants)
  return d_constants, d_initial, d_tokens, None


_scan.defvjp(_scan_forward, _scan_backward, symbolic_zeros=True)


def _blocks(arrays: Pytree, where: int) -> Pytree:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[where:], x.dtype), arrays)


def _arrays(blocks: Pytree, *where: int) -> Pytree:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*where, *x.shape), x.dtype), blocks)


def _specs(blocks: Pytree, where: Callable, buffers: int = 2) -> Pytree:
  """A block is one of the arrays, the one that where(batch, head, ...) says; two are there at a time, to overlap."""

  def spec(x):
    def index(*program):
      return (*where(*program), *(0,) * x.ndim)

    leading = len(where(0, 0, 0, 0))
    return pl.BlockSpec((None,) * leading + x.shape, index, pipeline_mode=pl.Buffered(buffers))

  return jax.tree.map(spec, blocks)


def _whole(arrays: Pytree) -> Pytree:
  """Arrays that stay in HBM, of which the kernel copies what it wants."""
  return jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), arrays)


def _scratch(blocks: Pytree, *where: int) -> Pytree:
  return jax.tree.map(lambda x: pltpu.VMEM((*where, *x.shape), x.dtype), blocks)


def _load(refs: Pytree, *at: jax.Array) -> Pytree:
  return jax.tree.map(lambda ref: ref[(*at, ...)], refs)


def _store(refs: Pytree, values: Pytree, *at: jax.Array) -> None:
  def store(ref, value):
    ref[(*at, ...)] = value.astype(ref.dtype)

  jax.tree.map(store, refs, values)


def _add(refs: Pytree, values: Pytree) -> None:
  _store(refs, jax.tree.map(lambda ref, value: ref[...] + value.astype(ref.dtype), refs, values))


def _cost(runs: list[tuple[int, Callable, Pytree]], traffic: list[tuple[float, Pytree]]) -> pl.CostEstimate:
  """The work of (how often, function, arguments) runs, the bytes of (how often, arrays) that cross HBM."""
  works = [(count, cost.work(function, *args)) for count, function, args in runs]
  return pl.CostEstimate(
    flops=sum(count * w.flops for count, w in works),
    transcendentals=sum(count * w.transcendentals for count, w in works),
    bytes_accessed=int(
      sum(count * math.prod(x.shape) * x.dtype.itemsize for count, xs in traffic for x in jax.tree.leaves(xs))
    ),
  )


def _parameters(recurrence: Recurrence, direction: str) -> dict[str, Any]:
  return dict(
    name=f"{recurrence.name}_{direction}",
    interpret=recurrence.interpret,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem.budget()
    ),
  )
