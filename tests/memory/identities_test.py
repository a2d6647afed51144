"""Identities that the method's equations imply (arXiv:2602.24281, section 3), in float64 and to 1e-9.

Causality with documents is in caching_test.py, with everything else that is true of every combination.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples
from marks import slow

from mc_jax import memory
from mc_jax.memory import networks, rules, segments

pytestmark = pytest.mark.usefixtures("float64")

LENGTH = 12
SEGMENTS = segments.constant(4)
MATRIX, DEEP = ("linear", "swla"), ("dla", "titans")
EVERY_RULE = [slow("linear"), "swla", slow("dla"), "titans"]


def rule_of(name, chunk=2):
  return rules.get(name, chunk=chunk, **({"expansion": 2} if name in DEEP else {}))


def inputs(rule, **options):
  return samples.inputs(rule, **dict(batch=2, length=LENGTH, heads=1, head_dim=3) | options)


def evaluate(name, aggregation, **options):
  """y, and for matrices (whose programs compile quickly) the gradients too, of random inputs."""
  rule = rule_of(name)
  x = inputs(rule)
  options |= dict(rule=rule, aggregation=aggregation, segmentation=SEGMENTS)
  if name in DEEP:
    return samples.forward(**options)(x)
  return samples.forward_and_back(**options)(x, None, samples.like(x.q))


def assert_same(a, b):
  chex.assert_trees_all_close(a, b, rtol=1e-9, atol=1e-9)


def test_independent_linear_memories_added_up_are_linear_attention():
  """Identity 1 (Eq. 13): M_0 = 0, so that sum_i M^(i) + M_t is the recurrence over the whole sequence."""
  rule = rule_of("linear")
  x = inputs(rule)._replace(init={"w": np.zeros((1, 3, 3))})
  cotangent = samples.like(x.q)

  def recurrence(x):
    def step(state, token):
      q, k, v = token
      state += k[..., :, None] * v[..., None, :]
      return state, jnp.einsum("bhi,bhio->bho", q, state)

    tokens = [jnp.moveaxis(w, 1, 0) for w in (x.q, x.k, x.v)]
    return jnp.moveaxis(jax.lax.scan(step, jnp.zeros((2, 1, 3, 3)), tokens)[1], 0, 1)

  options = dict(rule=rule, aggregation="residual", segmentation=SEGMENTS, carry="independent")
  y, gradient = samples.forward_and_back(**options)(x, None, cotangent)
  expected, pull = jax.vjp(recurrence, x)
  assert_same(y, expected)
  assert_same(gradient._replace(init=x.init), pull(cotangent)[0])


@pytest.mark.parametrize(
  ("name", "carry", "gate"),
  [
    ("linear", "independent", "softmax"),
    slow("swla", "checkpoint", "constant"),
    slow("dla", "independent", "constant"),
    ("titans", "checkpoint", "softmax"),
  ],
)
def test_a_single_segment_has_nothing_to_aggregate(name, carry, gate):
  """Identity 2, and `none` does not know of gates."""
  rule = rule_of(name, chunk=LENGTH)
  options = dict(rule=rule, carry=carry, segmentation=segments.constant(LENGTH + 3))
  expected = samples.forward(aggregation="none", gate="sigmoid", **options)(inputs(rule))
  for aggregation in memory.AGGREGATIONS:
    y = samples.forward(aggregation=aggregation, gate=gate, **options)(inputs(rule))
    assert_same(y, expected)


@pytest.mark.parametrize("name", EVERY_RULE)
def test_soup_is_grm_for_matrices_and_not_for_networks(name):
  """Identity 3, for any M_0."""
  soup, grm = evaluate(name, "soup"), evaluate(name, "grm")
  if name in MATRIX:
    assert_same(soup, grm)
  else:
    assert_same(soup[:, :4], grm[:, :4])  # nothing cached yet
    assert (np.abs(soup - grm)[:, 4:].max(-1) > 1e-4).all()


@pytest.mark.parametrize(("name", "top_k"), [slow("linear", 2), ("swla", 9), slow("dla", 9), ("titans", 2)])
def test_ssc_that_keeps_every_cache_is_grm(name, top_k):
  """Identity 4."""
  assert_same(evaluate(name, "ssc", top_k=top_k), evaluate(name, "grm"))


@pytest.mark.parametrize("name", EVERY_RULE)
def test_grm_with_constant_gates_is_residual(name):
  """Identity 5."""
  constant, residual = evaluate(name, "grm", gate="constant"), evaluate(name, "residual")
  assert_same(constant, residual)


@dataclasses.dataclass(frozen=True)
class Vector:
  """A memory that is a vector w, read as x * w, kept as a matrix [1, head_dim]."""

  least_features = 0.0

  def __call__(self, x, linear):
    return x * linear("w", jnp.ones_like(x[..., :1]))

  def init(self, key, heads, head_dim, value_dim=None):
    networks.require_equal_widths(head_dim, value_dim)
    return {"w": jax.random.normal(key, (heads, 1, head_dim))}


def test_segments_of_one_token_with_a_vector_for_a_memory_are_gated_attention():
  """Identity 6 (Eq. 18-20): y_t = sum_i softmax_i(<u_t, k_i>) (b + k_i) * q_t."""
  rule = rules.GradientRule("vector", Vector(), rules.dot_loss, chunk=2, step=False)
  x = inputs(rule, heads=2)
  cotangent = samples.like(x.q)

  def attention(x):
    # The loss -<k * w, v> has the gradient -k * v in w: v = 1 writes keys.
    scores = jnp.where(np.tri(LENGTH, dtype=bool), jnp.einsum("bthd,bshd->bhts", x.u, x.k), -jnp.inf)
    memories = x.init["w"][:, 0] + x.k
    return x.q * jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), memories)

  x = x._replace(v=np.ones_like(x.v))
  options = dict(rule=rule, segmentation=segments.constant(1), carry="independent")
  expected, pull = jax.vjp(attention, x)
  (expected_gradient,) = pull(cotangent)
  for aggregation in ("grm", "soup"):
    y, gradient = samples.forward_and_back(aggregation=aggregation, **options)(x, None, cotangent)
    assert_same(y, expected)
    assert_same(gradient._replace(v=0), expected_gradient._replace(v=0))


@pytest.mark.parametrize(
  ("name", "aggregation", "carry"),
  [
    slow("titans", "none", "checkpoint"),
    ("titans", "none", "independent"),
    ("linear", "residual", "checkpoint"),
    slow("linear", "residual", "independent"),
    ("titans", "grm", "checkpoint"),
    slow("titans", "grm", "independent"),
    slow("dla", "soup", "checkpoint"),
    ("dla", "soup", "independent"),
    ("swla", "ssc", "checkpoint"),
    slow("swla", "ssc", "independent"),
  ],
)
def test_nothing_leaks_from_a_later_token(name, aggregation, carry):
  """Identity 7, without documents: bit for bit. Row 0 is as it was, in row t token t is another one."""
  rule = rule_of(name)
  x, other = inputs(rule, batch=1), inputs(rule, batch=1, seed=5)
  changed = (np.arange(LENGTH) == np.arange(LENGTH)[:, None]) & (np.arange(LENGTH)[:, None] > 0)
  x, other = (samples.map_tokens(lambda w: np.repeat(w, LENGTH, axis=0), each) for each in (x, other))
  x = samples.select(~changed, x, other)
  y = samples.forward(rule=rule, aggregation=aggregation, segmentation=SEGMENTS, carry=carry, top_k=1)(x)
  for t in range(1, LENGTH):
    chex.assert_trees_all_equal(y[t, :t], y[0, :t])
    assert (y[t, t] != y[0, t]).all()


def test_the_networks_of_the_identities_are_those_of_the_rules():
  """Identities 3 to 5 for every rule: of what kind each one is."""
  kinds = {name: type(rules.get(name).network) for name in samples.GRADIENT_RULES}
  assert kinds == dict.fromkeys(MATRIX, networks.Matrix) | dict.fromkeys(DEEP, networks.MLP)
