"""Blocks read by the state that owns them: against a plain loop, with empty blocks and states that own none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from marks import slow
from quick_compile import jit

from mc_jax.kernels import vmem
from mc_jax.kernels.grouped import block_size, grouped

ROWS, STATES, TOKENS, WIDTH = 2, 4, 16, 8
# Every state owns a block; STATES marks an empty one.
OWNER = np.array([[0, 0, 1, 2, 3, 3, STATES], [0, 1, 2, 3, 3, STATES, STATES]], np.int32)


def network(x, state):
  dot = functools.partial(jnp.matmul, precision="highest", preferred_element_type=jnp.float32)
  return x + dot(jnp.tanh(dot(x, state["w1"].astype(x.dtype))).astype(x.dtype), state["w2"].astype(x.dtype))


def plain(x, gates, owner, states):
  def block(row, mine, x, gates):
    if mine >= STATES:
      return jnp.zeros_like(x)
    gates = gates[:, None]
    y = gates * network(x, jax.tree.map(lambda w: w[mine, row], states))
    return jnp.where(gates == 0, 0.0, y).astype(x.dtype)

  return jnp.stack(
    [jnp.stack([block(r, mine, x[r, i], gates[r, i]) for i, mine in enumerate(owner[r])]) for r in range(ROWS)]
  )


def arguments(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 6)
  x = jax.random.normal(keys[0], (*OWNER.shape, TOKENS, WIDTH), dtype)
  states = {
    "w1": jax.random.normal(keys[1], (STATES, ROWS, WIDTH, 3 * WIDTH)),
    "w2": jax.random.normal(keys[2], (STATES, ROWS, 3 * WIDTH, WIDTH)),
  }
  gates = jax.random.uniform(keys[4], x.shape[:3]) * jax.random.bernoulli(keys[5], 0.8, x.shape[:3])
  return x, gates, states, jax.random.normal(keys[3], x.shape)


def read(owner=OWNER, **options):
  return lambda x, gates, states: grouped(network, x, gates, owner, states, **{"interpret": True, **options})


def gradients(read, x, gates, states, d_y):
  @jit
  def run(x, gates, states, d_y):
    y, pull = jax.vjp(read, x, gates, states)
    return y, *pull(d_y.astype(y.dtype))

  return run(x, gates, states, d_y)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("owner", [OWNER, slow(OWNER[::-1])])
def test_agrees_with_a_plain_loop(dtype, owner):
  args = arguments(dtype)
  got = gradients(read(owner), *args)
  expected = gradients(lambda x, gates, states: plain(x, gates, owner, states), *args)
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2  # the loop adds up bfloat16 gradients
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), tolerance, tolerance * np.abs(b).max()),
    got,
    expected,
  )
  assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, expected)


def test_what_nobody_chose_has_exactly_zero_gradients():
  x, gates, states, d_y = arguments()
  x = x.at[OWNER == STATES].set(jnp.nan)  # whatever fills the empty blocks
  gates = gates.at[OWNER == 1].set(0.0)  # a block of fillers
  y, d_x, d_gates, d_states = gradients(read(), x, gates, states, d_y)
  empty = (OWNER == STATES) | (OWNER == 1)
  assert not any(a[empty].any() for a in (y, d_x, d_gates))
  for d in d_states.values():
    assert not d[1].any()
    assert d[np.array([0, 2, 3])].any(axis=(2, 3)).all()


def test_what_is_not_used_cannot_do_harm():
  """A token with a gate of 0 may have any cotangent: it is that of a token which another state serves."""
  x, gates, states, d_y = arguments()
  d_y = jnp.where(gates[..., None] == 0, jnp.inf, d_y)
  for leaf in jax.tree.leaves(gradients(read(), x, gates, states, d_y)[1:]):
    assert jnp.isfinite(leaf).all()


def test_gradients_of_bfloat16_states_add_up_in_float32():
  """A thousand like parts: in bfloat16 a sum stands still after some 256 of them."""
  owner = np.zeros((1, 1000), np.int32)
  x, states = jnp.ones((1, 1000, 16, 8), jnp.bfloat16), jnp.zeros((1, 1, 8, 8), jnp.bfloat16)

  def total(states):
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    y = grouped(product, x, jnp.ones(x.shape[:3]), owner, states, interpret=True)
    return y.astype(jnp.float32).sum()

  d = jax.grad(total)(states)
  assert d.dtype == jnp.bfloat16
  np.testing.assert_array_equal(d, 16_000)


def test_owners_may_be_traced():
  x, gates, states, _ = arguments()
  run = jax.jit(lambda x, owner: grouped(network, x, gates, owner, states, interpret=True))
  np.testing.assert_allclose(run(x, OWNER), plain(x, gates, OWNER, states), 1e-5, 1e-5)


def test_no_races(capfd):
  args = arguments()
  got = gradients(read(interpret=pltpu.InterpretParams(detect_races=True)), *args)
  expected = gradients(lambda x, gates, states: plain(x, gates, OWNER, states), *args)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5 * np.abs(b).max()), got, expected)
  assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
  ("capacity", "head_dim", "tokens"),
  [(128, 128, 256), (128, 256, 256), (17, 256, 256), (16, 256, 128), (16, 512, None)],
)
def test_blocks_fit_vmem(monkeypatch, capacity, head_dim, tokens):
  """As compiling for v5e (128 MiB) and v4 (16 MiB) has it: head_dim 256 with blocks of 256 is too much for v4."""
  monkeypatch.setattr(vmem, "capacity", lambda: capacity << 20)
  shape = jax.ShapeDtypeStruct
  states = shape((1, 1, head_dim, 4 * head_dim), jnp.float32), shape((1, 1, 4 * head_dim, head_dim), jnp.float32)
  assert block_size(lambda x, states: x, head_dim, states) == tokens
