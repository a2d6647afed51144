"""bfloat16 inputs: how far outputs and gradients may be off, and what stays in float32."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples

from mc_jax.memory import online, passes, rules, segments

LENGTH, SEGMENT = 64, 16


def inputs(rule):
  """Inputs of size 1, all numbers that bfloat16 has; q, k, v, u and the gates in bfloat16, M_0 in float32."""
  x = samples.inputs(rule, batch=2, length=LENGTH, head_dim=16)
  x = x._replace(init={name: w / np.sqrt(w.shape[-2]) for name, w in x.init.items()})
  x = jax.tree.map(lambda w: w.astype(jnp.bfloat16), x)
  return x._replace(init={name: w.astype(np.float32) for name, w in x.init.items()})


def distance(a, b):
  """||a - b|| / ||b||."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
  ("name", "aggregation", "carry"),
  [
    ("linear", "ssc", "independent"),
    ("swla", "residual", "checkpoint"),
    ("dla", "soup", "independent"),
    ("titans", "grm", "checkpoint"),
  ],
)
def test_bfloat16_is_near_float32(name, aggregation, carry):
  """A rounding to bfloat16 is off by at most 2^-9 of a number. A few follow one another (the operands of a product,
  what is read from a memory, the output) and what is summed is summed in float32, so errors neither line up nor grow
  with the length: outputs are within 2^-7, and gradients, which pass about twice as many, within 2^-6.
  """
  rule = rules.get(name, chunk=SEGMENT)
  x = inputs(rule)
  exact = jax.tree.map(lambda w: w.astype(np.float32), x)
  cotangent = samples.like(x.q)
  run = samples.forward_and_back(
    rule=rule, aggregation=aggregation, carry=carry, segmentation=segments.constant(SEGMENT)
  )
  y, gradient = run(x, None, cotangent)
  expected, expected_gradient = run(exact, None, cotangent.astype(np.float32))
  assert y.dtype == jnp.bfloat16
  assert expected.dtype == np.float32
  chex.assert_trees_all_equal_dtypes(gradient, x)
  assert distance(y, expected) < 2**-7
  for (path, g), e in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected_gradient), strict=True):
    if np.any(e):
      assert distance(g, e) < 2**-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize("carry", [True, False])
def test_states_scores_and_summaries_are_float32(carry):
  rule = rules.get("titans", chunk=8)
  x = inputs(rule)
  tokens = passes.Tokens(*jax.tree.map(lambda w: jnp.moveaxis(w, 2, 1), x[:5]), None)
  lengths = segments.constant(SEGMENT).lengths(LENGTH)

  def read(memory, q):
    return rule.network(q, lambda name, z: online.read(memory, name, z, q.dtype))

  write = functools.partial(passes.write, rule, lengths=lengths, read=read, carries=carry, side_by_side=1)
  written = jax.eval_shape(write, x.init, tokens)
  summarize = functools.partial(passes.summarize, rule, lengths=lengths, kind="mean", side_by_side=1)
  scores, summaries = jax.eval_shape(summarize, tokens)
  assert jax.tree.leaves(written.states)[0].shape[0] == len(summaries) == len(lengths)
  for leaf in jax.tree.leaves((written, scores, summaries)):
    assert leaf.dtype == np.float32
