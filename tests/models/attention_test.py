"""The attention layer: rotary positions and attention within a document."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_jax.models import ModelConfig
from mc_jax.models.attention import Attention, positions, rotate
from mc_jax.models.layer import Context

CONFIG = ModelConfig(d_model=16, heads=2, pattern="attention")


def test_positions_restart_at_each_document():
  document = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 2]])
  expected = jnp.array([[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 0, 1, 2, 3, 4, 0]], jnp.int32)
  chex.assert_trees_all_equal(positions(document), expected)


def test_rotation_is_a_complex_one_and_depends_on_the_distance_only():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 6, 1, 8))
  position = jnp.arange(6)[None]
  turned = rotate(q, position, 100.0)
  angle = np.arange(6)[:, None] * 100.0 ** (-np.arange(4) / 4)
  expected = (np.asarray(q)[0, :, 0, :4] + 1j * np.asarray(q)[0, :, 0, 4:]) * np.exp(1j * angle)
  chex.assert_trees_all_close(turned[0, :, 0, :4], expected.real, atol=1e-5)
  chex.assert_trees_all_close(turned[0, :, 0, 4:], expected.imag, atol=1e-5)

  def scores(offset):
    turned_q, turned_k = rotate(q, position + offset, 100.0), rotate(k, position + offset, 100.0)
    return jnp.einsum("bthd,bshd->bhts", turned_q, turned_k)

  chex.assert_trees_all_close(scores(0), scores(31), atol=1e-4)


def test_attention_is_the_softmax_written_out():
  attention = Attention(CONFIG, rngs=nnx.Rngs(jax.random.key(0, impl="rbg")))
  x = jax.random.normal(jax.random.key(1), (2, 7, 16))

  @jax.jit
  def written_out(x):
    position = jnp.arange(7)[None]
    q = rotate(attention.query(x), position, CONFIG.attention.rope_theta)
    k = rotate(attention.key(x), position, CONFIG.attention.rope_theta)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(8)
    scores = jnp.where(np.tril(np.ones((7, 7), bool)), scores, -jnp.inf)
    return attention.output(jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), attention.value(x)))

  chex.assert_trees_all_close(jax.jit(attention.__call__)(x)[0], written_out(x), atol=1e-5)


def test_a_packed_document_is_attended_as_if_alone():
  layer = Attention(CONFIG, rngs=nnx.Rngs(jax.random.key(0, impl="rbg")))
  attention = jax.jit(lambda x, document=None: layer(x, Context(document))[0])
  x = jax.random.normal(jax.random.key(1), (1, 14, 16))
  document = jnp.array([[0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 3, 3, 3, 3]])
  y = attention(x, document)
  chex.assert_tree_all_finite(y)
  for start, stop in [(1, 5), (5, 9), (10, 14)]:
    chex.assert_trees_all_close(y[:, start:stop], attention(x[:, start:stop]), atol=1e-5)
