"""Gated sums as kernels: against the sum written out, what may not leak, races, cost estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core
from marks import slow
from quick_compile import jit

from mc_jax.kernels import gated_sum as kernels
from mc_jax.memory import aggregate

ROWS, LENGTH, TILE = 2, 300, 128
KINDS = pytest.mark.parametrize("kind", ["matrix", slow("deep")])


def product(x, w):
  return jnp.matmul(x, w.astype(x.dtype), precision="highest", preferred_element_type=jnp.float32)


def matrix(x, memory):
  return product(x, memory["w"])


def deep(x, memory):
  return x + product(jax.nn.gelu(product(x, memory["w1"])).astype(x.dtype), memory["w2"])


def setting(kind, n=5, head_dim=16, dtype=jnp.float32, length=LENGTH, seed=0):
  """The contribution and random (x, gates, states), with about a tenth of the gates 0, and a cotangent."""
  rng = np.random.default_rng(seed)
  hidden = 2 * head_dim
  shapes = {"w": (head_dim, hidden)} if kind == "matrix" else {"w1": (head_dim, hidden), "w2": (hidden, head_dim)}
  states = {name: jnp.array(rng.normal(size=(n, ROWS, *s)) * s[0] ** -0.5, jnp.float32) for name, s in shapes.items()}
  x = jnp.array(rng.normal(size=(ROWS, length, head_dim)), dtype)
  gates = rng.normal(size=(n, ROWS, length)) * (rng.random((n, ROWS, length)) > 0.1)
  cotangent = jnp.array(rng.normal(size=(ROWS, length, hidden if kind == "matrix" else head_dim)), jnp.float32)
  return {"matrix": matrix, "deep": deep}[kind], (x, jnp.array(gates, jnp.float32), states), cotangent


def plain(contribution, counts):
  """Every contribution, then one sum over those that count."""

  def read(x, gates, states):
    n, _, length = gates.shape
    seen = jnp.arange(n)[:, None] < jnp.repeat(jnp.array(counts), TILE)[:length]
    y = jax.vmap(contribution, (None, 0))(x, states)
    return jnp.einsum("nrt,nrtd->rtd", jnp.where(seen[:, None] & (gates != 0), gates, 0.0), y, precision="highest")

  return read


def kernel(contribution, counts, interpret=True):
  def read(x, gates, states):
    return kernels.gated_sum(contribution, x, gates, states, counts, TILE, interpret=interpret)

  return read


def value_and_gradients(read, args, cotangent):
  def run(args, cotangent):
    y, pull = jax.vjp(read, *args)
    return y, pull(cotangent)

  return jit(run)(args, cotangent)


def assert_close(actual, expected, tolerance):
  """By the largest number of each array."""
  for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert a.dtype == e.dtype
    assert a.shape == e.shape
    a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
    assert np.abs(a - e).max() <= tolerance * max(np.abs(e).max(), 1e-30)


@KINDS
@pytest.mark.parametrize("n, counts", [(5, (0, 2, 4)), slow(9, (1, 9, 9)), (1, (0, 0, 1)), slow(3, (0, 0, 0))])
def test_values_and_gradients_are_those_of_the_sum(kind, n, counts):
  """The length is ragged, n no multiple of the states in a step, a first tile reads nothing."""
  contribution, args, cotangent = setting(kind, n)
  actual = value_and_gradients(kernel(contribution, counts), args, cotangent)
  assert_close(actual, value_and_gradients(plain(contribution, counts), args, cotangent), 2e-6)


@pytest.mark.parametrize("kind, head_dim", [("matrix", 8), slow("deep", 96), slow("matrix", 136)])
def test_widths_that_are_not_128(kind, head_dim):
  contribution, args, cotangent = setting(kind, head_dim=head_dim)
  actual = value_and_gradients(kernel(contribution, (1, 3, 5)), args, cotangent)
  assert_close(actual, value_and_gradients(plain(contribution, (1, 3, 5)), args, cotangent), 2e-6)


@KINDS
def test_bfloat16_is_summed_in_float32(kind):
  """Products of bfloat16 operands; each gradient in its argument's dtype."""
  contribution, (x, gates, states), cotangent = setting(kind, dtype=jnp.bfloat16)
  states = jax.tree.map(lambda w: w.astype(jnp.bfloat16), states)
  args = x, gates, states
  actual = value_and_gradients(kernel(contribution, (1, 3, 5)), args, cotangent)
  assert_close(actual[0], plain(contribution, (1, 3, 5))(*args), 2e-6)
  assert_close(actual, value_and_gradients(plain(contribution, (1, 3, 5)), args, cotangent), 2e-2)


@KINDS
def test_one_tile_is_the_loop_over_memories(kind):
  """`mc_jax.memory.aggregate.sum_of_stacked_reads`, which reads one count of memories with all tokens."""
  contribution, args, cotangent = setting(kind, length=TILE)
  loop = value_and_gradients(
    lambda x, gates, states: aggregate.sum_of_stacked_reads(contribution, x, gates, states, 3), args, cotangent
  )
  assert_close(value_and_gradients(kernel(contribution, (3,)), args, cotangent), loop, 2e-6)


@KINDS
@pytest.mark.parametrize("together", [slow(1), 2])
def test_fewer_states_a_step_and_stripes_change_nothing(kind, together, monkeypatch):
  contribution, args, cotangent = setting(kind)
  expected = value_and_gradients(kernel(contribution, (1, 4, 5)), args, cotangent)
  monkeypatch.setattr(kernels, "_together", lambda *_: together)
  monkeypatch.setattr(kernels, "_stripe", lambda *_: 2)
  assert_close(value_and_gradients(kernel(contribution, (1, 4, 5)), args, cotangent), expected, 2e-6)


@KINDS
def test_counts_may_be_traced(kind):
  contribution, args, cotangent = setting(kind)
  expected = value_and_gradients(kernel(contribution, (0, 2, 4)), args, cotangent)

  def run(args, cotangent, counts):
    y, pull = jax.vjp(kernel(contribution, counts), *args)
    return y, pull(cotangent)

  actual = jit(run)(args, cotangent, jnp.array([0, 2, 4]))
  assert_close(actual, expected, 1e-7)


@KINDS
def test_what_is_not_read_does_not_leak(kind):
  """Beyond a tile's count anything may stand, NaN included; where all gates are 0, an overflow stays out of the sum."""
  contribution, (x, gates, states), cotangent = setting(kind)
  counts = (1, 3, 3)
  gates = gates.at[1].set(0.0)
  expected = value_and_gradients(kernel(contribution, counts), (x, gates, states), cotangent)
  beyond = jax.tree.map(lambda w: w.at[3:].set(jnp.nan), states)
  actual = value_and_gradients(kernel(contribution, counts), (x, gates, beyond), cotangent)
  assert_close(actual, expected, 0.0)
  assert all(not np.asarray(w[3:]).any() for w in jax.tree.leaves(actual[1][2]))

  overflowed = jax.tree.map(lambda w: w.at[1].set(jnp.inf), states)
  y, (_, gates_grad, _) = value_and_gradients(kernel(contribution, counts), (x, gates, overflowed), cotangent)
  dropped = expected[1][1].at[1].set(0.0)
  assert_close((y, gates_grad), (expected[0], jnp.where(gates == 0, 0.0, dropped)), 1e-7)


def test_no_races(capfd):
  """In the simulation of a TPU's memory, copies included; it prints what it finds."""
  contribution, args, cotangent = setting("deep", n=3, head_dim=8)
  simulated = kernel(contribution, (0, 2, 3), pltpu.InterpretParams(detect_races=True))
  actual = value_and_gradients(simulated, args, cotangent)
  assert_close(actual, value_and_gradients(plain(contribution, (0, 2, 3)), args, cotangent), 2e-6)
  assert "RACE" not in "".join(capfd.readouterr()).upper()


def estimates(function, *args):
  """{name: cost estimate} of the kernels in a function."""
  found = {}

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      if "cost_estimate" in eqn.params:
        found[eqn.params["name"] or str(eqn.params["name_and_src_info"])] = eqn.params["cost_estimate"]
      for inner in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda p: isinstance(p, core.Jaxpr | core.ClosedJaxpr)
      ):
        if isinstance(inner, core.ClosedJaxpr):
          walk(inner.jaxpr)
        elif isinstance(inner, core.Jaxpr):
          walk(inner)

  walk(jax.make_jaxpr(function)(*args).jaxpr)
  return found


def test_the_cost_is_that_of_what_is_read():
  """One state a step, large enough: products of the pairs read, every state fetched when its block changes."""
  d, hidden, tile, n = 128, 512, 1024, 3
  x = jax.ShapeDtypeStruct((ROWS, 3 * tile, d), jnp.bfloat16)
  gates = jax.ShapeDtypeStruct((n, ROWS, 3 * tile), jnp.float32)
  states = {
    "w1": jax.ShapeDtypeStruct((n, ROWS, d, hidden), jnp.bfloat16),
    "w2": jax.ShapeDtypeStruct((n, ROWS, hidden, d), jnp.bfloat16),
  }
  d_y = jax.ShapeDtypeStruct(x.shape, jnp.float32)

  def read(x, gates, states):
    return kernels.gated_sum(deep, x, gates, states, (1, 2, 3), tile)

  forward, backward = estimates(lambda *args: jax.vjp(read, *args[:-1])[1](args[-1]), x, gates, states, d_y).values()
  pair = 2 * 2 * tile * d * hidden
  assert forward.flops == ROWS * 6 * pair
  assert backward.flops == 3 * forward.flops
  assert forward.transcendentals == backward.transcendentals == ROWS * 6 * tile * hidden
  state, gate = 2 * 2 * d * hidden, 4 * n * tile
  tokens = 3 * tile * d
  # All gates of a tile lie in one block, which is fetched once a tile forward, and when the tile
  # changes backward: 0, 1, 2; 1, 2; 2.
  assert forward.bytes_accessed == ROWS * (tokens * (2 + 4) + 3 * gate + 5 * state)  # 0; 0, 1; 0, 1, 2
  assert backward.bytes_accessed == ROWS * (tokens * (2 + 2 + 4) + 5 * gate + 6 * 4 * tile + 2 * n * state)


def test_tiles_are_large_enough_for_a_step_and_small_enough_for_vmem():
  def tile(kind, head_dim, length):
    contribution, _, _ = setting(kind, head_dim=8)
    shapes = (
      {"w": (head_dim, head_dim)}
      if kind == "matrix"
      else dict(w1=(head_dim, 4 * head_dim), w2=(4 * head_dim, head_dim))
    )
    states = {name: jax.ShapeDtypeStruct((4, ROWS, *s), jnp.float32) for name, s in shapes.items()}
    return kernels.query_tile(contribution, jax.ShapeDtypeStruct((ROWS, length, head_dim), jnp.bfloat16), states)

  assert (tile("matrix", 128, 4096), tile("deep", 128, 4096)) == (1024, 512)
  assert tile("deep", 128, 300) == 384
  assert tile("deep", 512, 4096) < 512


def test_tiles_and_counts_must_fit():
  contribution, (x, gates, states), _ = setting("matrix")
  with pytest.raises(ValueError, match="multiple of 128"):
    kernels.gated_sum(contribution, x, gates, states, (1,) * 3, 100)
  with pytest.raises(ValueError, match="each of the 3 tiles, got 2"):
    kernels.gated_sum(contribution, x, gates, states, (1, 1), TILE)
