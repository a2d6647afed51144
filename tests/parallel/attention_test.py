"""Attention on a mesh: what one device computes, whoever holds the queries; the kernel is the softmax."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow

from mc_jax.parallel import attention as parallel_attention
from mc_jax.parallel import mesh as meshes
from mc_jax.parallel.attention import attention, kernel_flops

BATCH, LENGTH, HEADS, HEAD_DIM = 2, 64, 4, 8


def arrays(length=LENGTH, head_dim=HEAD_DIM):
  """q, k, v and a cotangent; packed documents, one of them padding in the middle."""
  q, k, v, d_y = jax.random.normal(jax.random.key(0), (4, BATCH, length, HEADS, head_dim))
  ends = np.array([[0.3, 0.31, 0.8], [0.1, 0.5, 0.55]]) * length
  document = (np.arange(length) >= ends[..., None]).sum(1)
  return q, k, v, d_y, jnp.asarray(np.where(document == 2, 0, document + 1), jnp.int32)


def written_out(q, k, v, document):
  same = (document[:, :, None] == document[:, None, :]) & np.tril(np.ones((q.shape[1], q.shape[1]), bool))
  scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
  return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(same[:, None], scores, -jnp.inf)), v)


def with_gradients(fn, q, k, v, d_y, document):
  @jax.jit
  def run(q, k, v):
    y, pull = jax.vjp(lambda q, k, v: fn(q, k, v, document), q, k, v)
    return y, pull(d_y)

  return run(q, k, v)


@pytest.mark.parametrize(
  ("sizes", "packed"),
  [
    slow(dict(data=2, model=4), False),
    slow(dict(data=2, model=4), True),
    (dict(data=1, context=8), False),
    slow(dict(data=1, context=8), True),
    slow(dict(data=1, fsdp=2, context=2, model=2), False),
    (dict(data=1, fsdp=2, context=2, model=2), True),
  ],
  ids=lambda x: "x".join(map(str, x.values())) if isinstance(x, dict) else str(x),
)
def test_on_a_mesh_as_on_one_device(sizes, packed):
  *tensors, document = arrays()
  document = document if packed else jnp.ones_like(document)
  expected = with_gradients(written_out, *tensors, document)
  with jax.set_mesh(meshes.make(meshes.MeshConfig(**sizes))):
    result = with_gradients(lambda q, k, v, d: attention(q, k, v, d if packed else None), *tensors, document)
  chex.assert_trees_all_close(jax.device_get(result), jax.device_get(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("context", [slow(1), 2])
def test_the_kernel_is_the_softmax(context):
  *tensors, document = arrays(length=256 * context, head_dim=96)  # padded to the lanes
  expected = with_gradients(written_out, *tensors, document)
  kernel = functools.partial(attention, interpret=True)
  mesh = meshes.make(meshes.MeshConfig(context=context), jax.devices()[:context])
  with jax.set_mesh(mesh):
    result = with_gradients(kernel, *tensors, document)
  chex.assert_trees_all_close(jax.device_get(result), jax.device_get(expected), rtol=1e-4, atol=1e-4)


def test_rows_that_no_axis_divides_stay_whole():
  q, k, v, _, document = (x[:1, :63, :3] if x.ndim > 2 else x[:1, :63] for x in arrays())
  with jax.set_mesh(meshes.make(meshes.MeshConfig(data=2, context=2, model=2))):
    y = jax.jit(attention)(q, k, v, document)
  chex.assert_trees_all_close(y, written_out(q, k, v, document), rtol=1e-5, atol=1e-5)


def test_flops_of_tiles_on_and_below_the_diagonal():
  def forward(queries, keys):
    shapes = [(1, 4, 8), (1, 4, 64), (3, 2, queries, 64), (3, 2, keys, 64), (3, 2, keys, 64)]
    return kernel_flops("splash_mha_fwd_segmented_residuals", shapes)

  tile = 2 * 2 * 3 * 2 * 512**2 * 64  # two products for 6 rows
  assert parallel_attention._block(2048) == 512
  assert forward(2048, 2048) == (1 + 2 + 3 + 4) * tile
  assert forward(1024, 2048) == (3 + 4) * tile  # the later of two devices
  one_row = [(1, 4, 64), (2, 2048, 64), (2, 2048, 64), (2048, 128), (8, 2048)]  # whose axis XLA drops
  assert kernel_flops("splash_mha_dq_no_residuals", one_row) == 10 * tile / 3 * 3 / 2
  assert kernel_flops("titans_write_fwd", [(1,)]) is None
