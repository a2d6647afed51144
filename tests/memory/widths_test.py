"""Values wider or narrower than keys: matrices [head_dim, value_dim], through every pass and on one path or another.

Keys are 4 wide, values 8 or 2. Splitting over devices is tests/parallel/context_test.py's, compiling for TPUs
tests/kernels/compile_test.py's.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples
from marks import slow

from mc_jax import memory
from mc_jax.memory import decode, networks, rules, segments

FLOAT64 = pytest.mark.usefixtures("float64")
HEAD_DIM, WIDE, NARROW = 4, 8, 2
RULES = {
  "linear": rules.get("linear", chunk=samples.CHUNK),
  "swla": rules.get("swla", chunk=samples.CHUNK, window=3),
  # Errors solved for, momentum, and a cache of what came before in a chunk: titans' recurrence over a matrix.
  "delta": rules.GradientRule(
    "delta",
    networks.Matrix(),
    rules.squared_loss,
    samples.CHUNK,
    retention=True,
    momentum=True,
    normalized=True,
    solve=True,
  ),
}


@FLOAT64
@pytest.mark.parametrize(
  ("rule", "aggregation", "value_dim"),
  [
    ("swla", "ssc", WIDE),
    slow("linear", "none", NARROW),
    slow("linear", "residual", WIDE),
    slow("linear", "grm", WIDE),
    slow("linear", "grm", NARROW),
    slow("linear", "soup", WIDE),
    slow("linear", "ssc", NARROW),
    slow("swla", "none", WIDE),
    slow("swla", "residual", NARROW),
    slow("swla", "grm", WIDE),
    slow("swla", "soup", NARROW),
    slow("delta", "grm", WIDE),
    slow("delta", "ssc", NARROW),
  ],
)
def test_it_is_the_recurrence_with_documents_and_gradients(rule, aggregation, value_dim):
  options = dict(rule=RULES[rule], aggregation=aggregation, segmentation=segments.constant(samples.SEGMENT))
  samples.assert_equals_reference(samples.inputs(RULES[rule], value_dim=value_dim), samples.SEGMENT_IDS, **options)


@FLOAT64
@pytest.mark.parametrize("rule", [slow("linear"), "swla"])
def test_columns_of_values_do_not_know_of_each_other(rule):
  """The reference: twice as many channels are two memories of the same keys side by side."""
  x = samples.inputs(RULES[rule], batch=1, value_dim=2 * HEAD_DIM)
  run = samples.forward(rule=RULES[rule], segmentation=segments.constant(samples.SEGMENT), implementation="reference")
  halves = [x._replace(v=x.v[..., half], init={"w": x.init["w"][..., half]}) for half in np.s_[:HEAD_DIM, HEAD_DIM:]]
  np.testing.assert_allclose(run(x, None), np.concatenate([run(x, None) for x in halves], -1), rtol=1e-12, atol=1e-12)


@FLOAT64
@pytest.mark.parametrize(
  ("rule", "value_dim", "changes"),
  [
    ("swla", WIDE, dict(aggregation="grm")),
    slow("swla", NARROW, dict(aggregation="ssc", carry="independent")),
    slow("linear", WIDE, dict(aggregation="soup")),
    slow("linear", WIDE, dict(aggregation="ssc", memory="host")),
    slow("delta", WIDE, dict(aggregation="ssc")),
    slow("delta", NARROW, dict(aggregation="residual")),
  ],
)
def test_it_decodes_to_the_numbers_of_the_whole_sequence(rule, value_dim, changes):
  x = samples.inputs(RULES[rule], batch=2, value_dim=value_dim)
  options = decode.Options(RULES[rule], segments.constant(samples.SEGMENT), capacity=5, **changes)
  expected = samples.jit(lambda x: memory.run(x.tokens(), x.init, options))(x)
  prompt = samples.map_tokens(lambda a: a[:, :8], x)
  y, cache = samples.jit(lambda x: decode.prefill(options, x.tokens(), x.init))(prompt)
  empty = decode.init_cache(options, x.init, batch=2, head_dim=HEAD_DIM, dtype=x.q.dtype)
  assert jax.tree.map(jnp.shape, empty) == jax.tree.map(jnp.shape, cache)
  step = samples.jit(lambda token, cache: decode.step(options, token.tokens(), x.init, cache))
  for t in range(8, 15):
    token, cache = step(samples.map_tokens(lambda a, t=t: a[:, t : t + 1], x), cache)
    y = jnp.concatenate([y, token], 1)
  np.testing.assert_allclose(y, expected[:, :15], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
  ("rule", "aggregation", "value_dim"),
  [
    ("linear", "grm", 16),
    slow("swla", "grm", 16),
    slow("swla", "ssc", 16),
    slow("swla", "ssc", 4),
    slow("linear", "soup", 4),
    slow("linear", "residual", 16),
    slow("delta", "none", 16),
    slow("delta", "grm", 4),
  ],
)
def test_kernels_and_their_gradients_are_xla(rule, aggregation, value_dim):
  rule = dataclasses.replace(RULES[rule], chunk=8)
  x = jax.tree.map(np.float32, samples.inputs(rule, batch=1, length=32, head_dim=8, value_dim=value_dim))
  options = dict(rule=rule, aggregation=aggregation, segmentation=segments.constant(16))
  kernels, xla = (
    samples.forward_and_back(implementation=implementation, **options)(x, None, x.v)
    for implementation in ("pallas", "xla")
  )
  for a, b in zip(jax.tree.leaves(kernels), jax.tree.leaves(xla), strict=True):
    assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


@pytest.mark.parametrize("name", ["dla", "titans"])
def test_networks_with_a_skip_answer_as_wide_as_they_are_asked(name):
  rule, key = rules.get(name), jax.random.key(0)
  message = "value_dim must be head_dim = 4: an MLP answers with x + ..., and only a matrix memory with another width"
  with pytest.raises(ValueError, match=re.escape(message)):
    rule.init(key, heads=1, head_dim=HEAD_DIM, value_dim=WIDE)
  shapes = [jax.eval_shape(lambda w=w: rule.init(key, heads=1, head_dim=HEAD_DIM, **w)) for w in ({}, {"value_dim": 4})]
  assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
  ("rule", "value_dim", "got"), [("linear", None, 8), ("linear", 8, 4), ("swla", 2, 4), ("titans", None, 8)]
)
def test_values_are_as_wide_as_the_answers(rule, value_dim, got):
  rule = rules.get(rule)
  x = samples.inputs(rule, value_dim=value_dim)
  shape = *x.q.shape[:3], value_dim or HEAD_DIM
  message = f"v must be [batch, length, heads, value_dim] = {shape}, as wide as the answers of init's weights; got"
  with pytest.raises(ValueError, match=re.escape(message)):
    samples.call(x._replace(v=np.zeros((*shape[:3], got))), rule=rule, segmentation=segments.constant(4))


def test_init_takes_keys():
  x, rule = samples.inputs(RULES["linear"]), RULES["linear"]
  with pytest.raises(ValueError, match=re.escape("init['w'] must be [heads, in, out] with in = 4; got in = 8")):
    samples.call(x._replace(init={"w": np.zeros((2, 8, 4))}), rule=rule, segmentation=segments.constant(4))
