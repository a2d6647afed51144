"""Walking pieces of a sequence, one after the other and side by side, against loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples

from mc_jax.memory import pieces

LENGTHS = (3, 3, 3, 3, 3, 2, 1)


def rows(heads=3):
  return np.random.default_rng(0).normal(size=(2, heads, sum(LENGTHS), 4)).astype(np.float32)


@pytest.mark.parametrize(("remat", "unroll"), [(False, 1), (True, 2)])
def test_a_scan_hands_its_carry_from_piece_to_piece(remat, unroll):
  x = rows()

  def step(total, x, index):
    total = total + x.sum(-2)
    return total, {"y": x + total[..., None, :]}, (total, index + total[..., 0])

  def scan(x):
    end, outputs, state_outputs = pieces.scan(step, jnp.zeros((2, 3, 4)), x, LENGTHS, remat=remat, unroll=unroll)
    return end.sum(), (end, outputs, state_outputs)

  gradient, (end, outputs, (totals, seen)) = samples.jit(jax.grad(scan, has_aux=True))(x)
  expected, start, running = [], 0, np.zeros((2, 3, 4), np.float32)
  for i, length in enumerate(LENGTHS):
    piece = x[:, :, start : start + length]
    running = running + piece.sum(-2)
    expected.append(piece + running[..., None, :])
    chex.assert_trees_all_close(totals[i], running, atol=1e-5)
    chex.assert_trees_all_close(seen[i], i + running[..., 0], atol=1e-5)
    start += length
  chex.assert_trees_all_close(outputs["y"], np.concatenate(expected, 2), atol=1e-5)
  chex.assert_trees_all_close(end, running, atol=1e-5)
  chex.assert_trees_all_equal(gradient, np.ones_like(x))


@pytest.mark.parametrize("together", [2, 3, 16])
def test_pieces_side_by_side_are_the_same_pieces(together):
  x, seen = rows(), []

  def step(_, x, index):
    seen.append(x.shape)
    y = jnp.cumsum(x, axis=-2)
    return (), y, y[..., -1, :]

  def scan(x):
    return pieces.scan(step, (), x, LENGTHS, together=together)

  _, y, ends = samples.numpy(samples.jit(scan))(x)
  start = 0
  for i, length in enumerate(LENGTHS):
    expected = np.cumsum(x[:, :, start : start + length], axis=2)
    chex.assert_trees_all_close(y[:, :, start : start + length], expected, atol=1e-5)
    chex.assert_trees_all_close(ends[i], expected[..., -1, :], atol=1e-5)
    start += length
  assert max(shape[0] for shape in seen) == 2 * min(together, 5)


def test_the_index_of_pieces_side_by_side_is_their_last():
  def step(_, x, index):
    return (), x + index, ()

  _, y, _ = pieces.scan(step, (), np.zeros((1, 1, 7)), (1,) * 7, together=3)
  assert y[0, 0].tolist() == [2, 2, 2, 5, 5, 5, 6]
  _, y, _ = pieces.scan(step, (), np.zeros((1, 1, 7)), (2, 2, 2, 1), last=np.array([1, 3, 8, 9]))
  assert y[0, 0].tolist() == [1, 1, 3, 3, 8, 8, 9]
