"""Pages against plain indexing; host memory on a CPU, whose programs keep it apart as a TPU's do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples

from mc_jax.memory import pages

SHAPES = {"w1": (12, 20), "w2": (20, 12), "b": (3, 5)}
DTYPES = [np.float32, jnp.bfloat16, np.int8]


def matrices(dtype, lead=()):
  rng = np.random.default_rng(0)
  return {name: rng.integers(-128, 128, (*lead, *shape)).astype(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_pages_hold_matrices_of_any_size_in_whole_tiles(dtype):
  given = matrices(dtype, (2, 3))
  packed = samples.jit(pages.pack)(given)
  rows = -(-(2 + 2 + 1) // 8) * 8 if dtype != jnp.bfloat16 else 16
  assert packed.shape == (2, 3, rows, 128)
  assert packed.dtype == (np.int32 if dtype == np.int8 else dtype)
  like = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in SHAPES.items()}
  jax.tree.map(np.testing.assert_array_equal, samples.jit(functools.partial(pages.unpack, like=like))(packed), given)


@pytest.mark.parametrize("batch", [3, 40])  # 80 pages are more than are fetched at once
def test_writing_and_fetching_are_indexing(batch):
  rng, slots, heads = np.random.default_rng(0), 7, 2
  plain = np.zeros((slots, batch, heads, 8, 128), np.float32)
  held = jax.jit(lambda: pages.to_host(jnp.zeros(plain.shape)))()
  every = np.arange(batch)

  @functools.partial(jax.jit, donate_argnums=0)
  def write(held, slot, rows, new):
    return pages.write(held, slot, rows, lambda b: new[b])

  for share in (0, 0.5, 0.5, 1):
    slot, rows = rng.integers(0, slots, batch, np.int32), rng.random(batch) < share
    new = rng.normal(size=plain.shape[1:]).astype(np.float32)
    plain[slot[rows], every[rows]] = new[rows]
    before, held = held, write(held, slot, rows, new)
    assert before.is_deleted()
  assert held.sharding.memory_kind == "pinned_host"
  np.testing.assert_array_equal(held, plain)
  slot = rng.integers(0, slots, (batch, heads), np.int32)
  found = jax.jit(pages.fetch)(held, slot)
  assert found.sharding.memory_kind == "device"
  np.testing.assert_array_equal(found, plain[slot, every[:, None], np.arange(heads)])


def test_rows_are_repeated_in_host_memory():
  plain = np.random.default_rng(0).normal(size=(4, 2, 3, 8, 128)).astype(np.float32)
  held = jax.jit(pages.to_host)(plain)
  found = pages.repeat(held, 3)
  assert found.sharding.memory_kind == "pinned_host"
  np.testing.assert_array_equal(found, np.repeat(plain, 3, axis=1))
