"""The scan over chunks as a kernel: against `jax.lax.scan` of the same step, what it fetches, races, cost estimates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core
from marks import slow
from quick_compile import jit

from mc_jax.kernels.recurrence import Recurrence, scan

BATCH, HEADS, CHUNK, WIDTH = 2, 3, 8, 4


def product(a, b):
  return jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)


def step(constants, carry, tokens, marks):
  """Nonlinear in all it gets; the outputs are read before the carry changes."""
  matrix, vector = carry
  x = tokens["x"].astype(jnp.float32)
  kept = jnp.where(marks == 1, 0.0, tokens["gate"])[..., None]
  y = product(x, constants["w"] * matrix) + constants["b"]
  hidden = jnp.tanh(product(x, matrix) + vector)
  matrix = constants["b"] * matrix + product(jnp.swapaxes(x, -1, -2), kept * hidden)
  vector = jnp.sin(vector + (kept * x).sum(-2, keepdims=True))
  return (matrix, vector), {"y": y, "norm": (hidden * hidden).sum(-1)}


def start(constants):
  return jnp.sin(constants["w"]), 2.0 * constants["b"]


def arguments(segments, chunks, dtype=jnp.float32):
  """constants, initial, tokens and marks."""
  rng = np.random.default_rng(0)
  length = segments * chunks * CHUNK

  def normal(*shape, dtype=jnp.float32):
    return jnp.array(0.5 * rng.normal(size=shape), dtype)

  constants = {"w": normal(HEADS, WIDTH, WIDTH), "b": normal(HEADS, 1, WIDTH)}
  initial = normal(BATCH, HEADS, WIDTH, WIDTH), normal(BATCH, HEADS, 1, WIDTH)
  tokens = {"x": normal(BATCH, HEADS, length, WIDTH, dtype=dtype), "gate": normal(BATCH, HEADS, length, dtype=dtype)}
  return constants, initial, tokens, jnp.array(rng.integers(0, 3, (BATCH, 1, length)), jnp.int32)


def kernel(chunks, start=None, interpret=True):
  """(constants, initial, tokens, marks) to (outputs, ends, last)."""
  return functools.partial(scan, Recurrence(step, start, CHUNK, chunks, interpret=interpret))


def plain(segments, chunks, start=None):
  """The same by `jax.lax.scan`: chunks in segments, for every row and head."""

  def one(constants, initial, tokens, marks):
    constants, initial = jax.tree.map(lambda x: x[None], (constants, initial))

    def segment(carry, xs):
      carry = carry if start is None else start(constants)
      end, y = jax.lax.scan(lambda carry, x: step(constants, carry, *x), carry, xs)
      return end, (y, end)

    xs = jax.tree.map(lambda x: x.reshape(segments, chunks, 1, CHUNK, *x.shape[1:]), (tokens, marks))
    _, (y, ends) = jax.lax.scan(segment, initial, xs)
    ends = jax.tree.map(lambda x: x[:, 0], ends)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[4:]), y), ends, jax.tree.map(lambda x: x[-1], ends)

  rows = jax.vmap(jax.vmap(one, (0, 0, 0, None), (0, 1, 0)), (None, 0, 0, 0), (0, 1, 0))
  return lambda constants, initial, tokens, marks: rows(constants, initial, tokens, marks[:, 0])


def everything(y, ends, last):
  return y, ends, last


def like(tree, seed=1):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape), x.dtype), tree)


def differentiated(run, used=everything):
  """A function of `arguments`: outputs and ends, and the gradients of a sum of those used, weighted at random."""

  def weighted(*args):
    out = run(*args)
    parts = jax.tree.map(jnp.vdot, used(*out), like(used(*out)))
    return sum(jax.tree.leaves(parts)), out

  return jax.value_and_grad(weighted, (0, 1, 2), has_aux=True)


def value_and_gradients(run, args, used=everything):
  return jit(differentiated(run, used))(*args)


def assert_close(actual, expected, tolerance):
  """By the largest number of each array."""
  for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    assert (a.shape, a.dtype) == (e.shape, e.dtype), jax.tree_util.keystr(path)
    a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
    assert np.abs(a - e).max() <= tolerance * np.abs(e).max(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
  "segments, chunks, start",
  [(1, 1, None), slow(3, 1, start), slow(1, 2, start), (3, 2, None), slow(1, 3, None), (2, 3, start), slow(2, 3, None)],
)
def test_values_and_gradients_are_those_of_a_scan(segments, chunks, start):
  args = arguments(segments, chunks)
  got = value_and_gradients(kernel(chunks, start), args)
  expected = value_and_gradients(plain(segments, chunks, start), args)
  assert_close(got, expected, 2e-6)
  constants, initial, tokens = expected[1]
  assert all(np.asarray(d).any() for d in jax.tree.leaves((constants, tokens)))
  assert all(np.asarray(d).any() == (start is None) for d in jax.tree.leaves(initial))


def kernels(function, args):
  """The equations of the kernels in a function, by name."""
  return _kernels(jax.make_jaxpr(function)(*args).jaxpr)


def _kernels(jaxpr):
  found = {}
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "pallas_call":
      found[eqn.params["name"]] = eqn
    for inner in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda p: isinstance(p, core.Jaxpr | core.ClosedJaxpr)
    ):
      if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
        found |= _kernels(getattr(inner, "jaxpr", inner))
  return found


@pytest.mark.parametrize(
  "used",
  [
    slow(lambda y, ends, last: y, id="outputs"),
    slow(lambda y, ends, last: ends, id="ends"),
    slow(lambda y, ends, last: last, id="last"),
    pytest.param(lambda y, ends, last: (y["norm"], ends[0], last[1]), id="some of each"),
    pytest.param(lambda y, ends, last: (y["y"], ends[1][0]), id="one end"),  # the first segment's end only
  ],
)
def test_what_nothing_was_made_of_has_no_cotangent_to_fetch(used):
  segments, chunks = 2, 2
  args = arguments(segments, chunks)
  got = value_and_gradients(kernel(chunks), args, used)
  assert_close(got, value_and_gradients(plain(segments, chunks), args, used), 2e-6)
  out = got[0][1]

  def fetched(used):
    return len(kernels(differentiated(kernel(chunks), used), args)["recurrence_bwd"].invars)

  unused = len(jax.tree.leaves(out)) - len(jax.tree.leaves(used(*out)))
  assert fetched(used) == fetched(everything) - unused


def test_tokens_may_be_bfloat16():
  """Carries, outputs and the gradients of constants are float32; a token's gradient is rounded once."""
  args = arguments(2, 2, jnp.bfloat16)
  (_, out), gradients = value_and_gradients(kernel(2), args)
  (_, expected_out), expected = value_and_gradients(plain(2, 2), args)
  assert_close((out, gradients[:2]), (expected_out, expected[:2]), 2e-6)
  assert_close(gradients[2], expected[2], 2**-8)
  assert gradients[2]["x"].dtype == jnp.bfloat16


def test_no_races(capfd):
  """In the simulation of a TPU's memory, copies included; it prints what it finds."""
  args = arguments(2, 2)
  got = value_and_gradients(kernel(2, interpret=pltpu.InterpretParams(detect_races=True)), args)
  assert_close(got, value_and_gradients(plain(2, 2), args), 2e-6)
  assert "RACE" not in "".join(capfd.readouterr()).upper()


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_cost_is_that_of_the_steps(chunks):
  """Forward three products a chunk; backward they run again, with two for each, and two more to come to the chunk."""
  segments = 2
  args = arguments(segments, chunks)
  found = kernels(differentiated(kernel(chunks)), args)
  forward, backward = (found[f"recurrence_{way}"].params["cost_estimate"] for way in ("fwd", "bwd"))
  rows, product = BATCH * HEADS * segments, 2 * CHUNK * WIDTH * WIDTH
  assert forward.flops == rows * chunks * 3 * product
  assert backward.flops == rows * (chunks * 9 + (chunks - 1) * 2) * product
  tanh, sin = CHUNK * WIDTH, WIDTH
  assert forward.transcendentals == rows * chunks * (tanh + sin)
  assert backward.transcendentals == rows * (chunks * (tanh + 2 * sin) + (chunks - 1) * (tanh + sin))

  def size(*trees):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))

  # Constants are fetched for every row, marks for every head, and backward, tokens on the way and on the way back.
  constants, initial, tokens, marks = args
  y, ends, last = jax.eval_shape(kernel(chunks), *args)
  each = BATCH * size(constants), HEADS * size(marks)
  assert forward.bytes_accessed == size(initial, tokens, y, ends) + sum(each)
  twice = 2 - 1 / chunks
  coming, going = twice * (size(tokens) + each[1]) + each[0], size(initial, tokens) + BATCH * size(constants)
  assert backward.bytes_accessed == int(size(initial, ends, y, ends, last) + coming + going)
