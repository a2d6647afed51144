"""Writing in chunks: every kind of rule against the reference, and decays over many tokens."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples
from marks import slow

from mc_jax.memory import arithmetic, chunk, documents, networks, rules, segments
from mc_jax.memory.rules import gradient

FLOAT64 = pytest.mark.usefixtures("float64")
# Rows of documents in which a window reaches over several chunks, padding and starts.
LENGTH = 12
SEGMENT_IDS = np.array([[1] * 6 + [0] + [2] * 5, [3] * 2 + [4] * 10, [0] * 3 + [5] + [6] * 8])


DELTA = rules.GradientRule("delta", networks.Matrix(), rules.squared_loss, chunk=4, normalized=True, solve=True)


@FLOAT64
@pytest.mark.parametrize(
  ("rule", "aggregation", "carry"),
  [
    # One token a chunk: the recurrences themselves.
    (rules.get("linear", chunk=1), "ssc", "independent"),
    (rules.get("swla", chunk=1, window=3), "soup", "checkpoint"),
    slow(rules.get("dla", chunk=1, expansion=2, normalized=False), "residual", "independent"),
    (rules.get("titans", chunk=1, expansion=2, max_grad_norm=4.0, normalized=False), "grm", "checkpoint"),
    # Windows longer than chunks.
    (rules.get("swla", chunk=2, window=4), "grm", "checkpoint"),
    slow(rules.get("swla", chunk=2, window=3), "ssc", "independent"),
    # Networks of other depths; the printed form of dla.
    slow(rules.get("titans", chunk=2, depth=1, norm=True, normalized=False), "none", "checkpoint"),
    slow(rules.get("titans", chunk=2, depth=3, expansion=1, max_grad_norm=1.0, normalized=False), "grm", "checkpoint"),
    (
      rules.get("dla", chunk=2, expansion=1, retention=False, max_grad_norm=None, normalized=False),
      "none",
      "checkpoint",
    ),
    # Steps in units of the error, solved for in the chunk or frozen.
    slow(rules.get("titans", chunk=1, expansion=2), "grm", "independent"),
    (rules.get("titans", chunk=4, expansion=2), "grm", "checkpoint"),
    slow(rules.get("titans", chunk=4, depth=3, expansion=1, norm=True), "soup", "checkpoint"),
    slow(rules.get("titans", chunk=2, expansion=2, solve=False), "ssc", "independent"),
    (rules.get("dla", chunk=4, expansion=2), "residual", "checkpoint"),
    (DELTA, "ssc", "checkpoint"),
    # A rule of one's own: everything at once, and momentum without retention or step sizes.
    slow(
      rules.GradientRule(
        "windowed titans",
        networks.MLP(2, 2, norm=True),
        rules.squared_loss,
        chunk=2,
        retention=True,
        momentum=True,
        window=3,
        max_grad_norm=3.0,
      ),
      "grm",
      "checkpoint",
    ),
    (
      rules.GradientRule("momentum", networks.Matrix(), rules.squared_loss, chunk=2, momentum=True, step=False),
      "soup",
      "independent",
    ),
  ],
  ids=lambda x: f"{x.name}{x.chunk}" if isinstance(x, rules.Rule) else x,
)
def test_every_rule_writes_what_the_reference_writes(rule, aggregation, carry):
  x = samples.inputs(rule, batch=3, length=LENGTH)
  segmentation = segments.constant(min(2 * rule.chunk, 4))
  options = dict(rule=rule, aggregation=aggregation, carry=carry, segmentation=segmentation)
  samples.assert_equals_reference(x, SEGMENT_IDS, **options)


def last_state(rule, x, segment_ids):
  """The state after rows x of one chunk."""
  marks = documents.Documents(*(w[:, None] for w in documents.index(segment_ids)))
  k, v, gates = (jax.tree.map(lambda w: jnp.moveaxis(w, 2, 1), w) for w in (x.k, x.v, x.gates))
  return rule.write(rule.start(x.init, k), x.init, k, v, gates, marks, solve=arithmetic.solve)[0]


@FLOAT64
@pytest.mark.parametrize("window", [2, 5])
def test_the_tail_is_the_last_documents_last_pairs(window):
  rule = rules.get("swla", window=window)
  x = samples.inputs(rule, batch=3, length=LENGTH)
  segment_ids = np.array([[1] * 6 + [0] + [2] * 5, [3] * 9 + [0] * 3, [4] * 8 + [5] * 2 + [0] * 2])
  last = [[8, 9, 10, 11], [5, 6, 7, 8], [None, None, 8, 9]]  # tokens of the last document, at most 4
  state = samples.jit(functools.partial(last_state, rule))(
    samples.select(segment_ids > 0, x, 0.0), jnp.asarray(segment_ids)
  )
  for row, tokens in enumerate(last):
    for place, t in enumerate(tokens[-(window - 1) :]):
      for tail, source in zip(state.tail, (x.k, x.v), strict=True):
        expected = np.zeros_like(source[row, 0]) if t is None else source[row, t]
        chex.assert_trees_all_equal(np.asarray(tail[row, :, place]), expected)


@FLOAT64
def test_a_chunk_of_any_length_is_exact_for_dot_losses_of_matrices_only():
  def end_of_row(name, chunk):
    rule = rules.get(name, chunk=chunk, **({"expansion": 2} if name == "titans" else {}))
    options = dict(rule=rule, aggregation="none", segmentation=segments.constant(LENGTH))
    return samples.forward(**options)(samples.inputs(rule, batch=1, length=LENGTH))

  chex.assert_trees_all_close(end_of_row("swla", 2), end_of_row("swla", LENGTH), rtol=1e-9, atol=1e-9)
  assert np.abs(end_of_row("titans", 2) - end_of_row("titans", LENGTH)).max() > 1e-3


@pytest.mark.parametrize("low", [1e-30, 0.01, 0.999])
def test_decays_over_a_thousand_tokens_are_finite_and_right_in_float32(low):
  """Ratios of products, or a mask after the exponential, give inf and NaN here."""
  rng = np.random.default_rng(0)
  length = 1000
  gates = {name: rng.uniform(low, low**0.9, length).astype(np.float32) for name in ("alpha", "beta")}
  gates["eta"] = np.ones(length, np.float32)
  alpha, beta = (gates[name].astype(np.float64) for name in ("alpha", "beta"))

  def read(gates):
    seen = documents.visible(None, length)
    c = chunk.coefficients(gates["alpha"], gates["beta"], (gates["eta"],), seen, jnp.float32)
    return (c.decay.sum() + c.carry.sum() + c.mix.sum() + c.momentum.sum() + c.kept[-1]), c

  (_, c), slopes = jax.jit(jax.value_and_grad(read, has_aux=True))(gates)
  chex.assert_tree_all_finite((c, slopes))
  decay, carry, row = 1.0, 0.0, np.zeros(length)
  momentum, kept = np.zeros(length), 1.0
  for t in range(length):  # one more token: the recurrence of the coefficients themselves
    kept *= beta[t]
    momentum *= beta[t]
    momentum[t] = 1.0
    decay *= alpha[t]
    carry = alpha[t] * carry + kept
    row = alpha[t] * row + momentum
    if t in (0, 300, length - 1):
      expected = (decay, carry, row)
      actual = (c.decay[t], c.carry[t], c.mix[t])
      chex.assert_trees_all_close(actual, jax.tree.map(np.float32, expected), rtol=1e-3, atol=1e-6)
  found = c.kept[-1], c.momentum
  chex.assert_trees_all_close(found, jax.tree.map(np.float32, (kept, momentum)), rtol=1e-3, atol=1e-6)


@FLOAT64
def test_a_gate_of_zero_forgets_everything():
  rule = rules.get("swla", chunk=4)
  x = samples.inputs(rule, batch=1, length=8)
  x.gates["alpha"][:, 5] = 0.0
  options = dict(rule=rule, aggregation="none", segmentation=segments.constant(8))
  y = samples.forward(**options)(x)
  forgotten = samples.select(np.arange(8) > 3, x, samples.inputs(rule, batch=1, length=8, seed=5))
  forgotten = forgotten._replace(init=jax.tree.map(np.zeros_like, x.init))
  chex.assert_trees_all_close(samples.forward(**options)(forgotten)[:, 5:], y[:, 5:], rtol=1e-9, atol=1e-9)


@FLOAT64
def test_inner_gradients_are_cut_to_their_norm_all_layers_together():
  rule = rules.get("titans", expansion=2, normalized=False)
  x = samples.inputs(rule, batch=2, length=5)
  k, v = (jnp.moveaxis(w, 2, 1) for w in (x.k, x.v))

  @functools.partial(samples.jit, static_argnums=0)
  def norms(max_grad_norm):
    bounded = dataclasses.replace(rule, max_grad_norm=max_grad_norm)
    memory = rule.start(x.init, k).memory
    keys = gradient.key_gradients(bounded, k, v, arithmetic.dense(memory, k.dtype), x.init)
    z, delta = keys.pull(keys.answers)
    outer = [jnp.einsum("...i,...o->...io", z[name], delta[name]) for name in delta]
    return jnp.sqrt(sum(jnp.square(g).sum((-2, -1)) for g in outer))

  free = norms(None)
  assert free.min() < 3.0 < free.max()
  for bound in (0.5, 3.0, 100.0):
    chex.assert_trees_all_close(norms(bound), jnp.minimum(free, bound), rtol=1e-9)


@pytest.mark.parametrize(
  ("rule", "dtype"),
  [
    slow(rules.get("titans", chunk=4, expansion=2), "float32"),
    (rules.get("titans", chunk=4, expansion=2), "bfloat16"),
    slow(rules.get("dla", chunk=4, expansion=2, depth=3, norm=True), "float32"),
    slow(rules.get("dla", chunk=4, expansion=2, depth=3, norm=True), "bfloat16"),
  ],
  ids=lambda x: getattr(x, "name", x),
)
def test_gradients_are_finite_where_nothing_is_written(rule, dtype):
  """At padding, whose keys are zero, and at tokens whose values memories answer already: shares are 0 / 0."""
  x = samples.inputs(rule, batch=3, length=LENGTH)
  own = rule.network(jnp.moveaxis(x.k, 2, 1), arithmetic.dense(jax.tree.map(jnp.asarray, x.init), jnp.dtype("float32")))
  x = x._replace(v=np.where((np.arange(LENGTH) % 2 == 0)[:, None, None], np.moveaxis(own, 1, 2), x.v))
  x = jax.tree.map(lambda a: a.astype("float32"), x)
  x = x._replace(**{name: jnp.asarray(getattr(x, name), dtype) for name in "qkvu"})

  @samples.jit
  def gradients(x):
    options = dict(rule=rule, aggregation="grm", segmentation=segments.constant(8), segment_ids=SEGMENT_IDS)
    return jax.grad(lambda x: samples.call(x, **options).astype("float32").sum())(x)

  for name, leaf in zip(x._fields, gradients(x), strict=True):
    for slope in jax.tree.leaves(leaf):
      assert np.isfinite(slope).all(), name


def test_a_state_names_its_layers_in_their_order():
  """Outside jit, which sorts them: `networks.last` reads the first one's width."""
  rule = rules.get("titans", chunk=4, expansion=2)
  x = samples.inputs(rule, batch=1, length=4)
  k, v = (jnp.moveaxis(w, 2, 1) for w in (x.k, x.v))
  gates = {name: jnp.moveaxis(g, 2, 1) for name, g in x.gates.items()}
  start = rule.start(x.init, k)
  end, _ = rule.write(start, x.init, k, v, gates, None, solve=arithmetic.solve)
  assert list(end.memory) == list(start.memory) == list(x.init)
  assert networks.last(rule.network, end.memory) == "w2"


def test_a_network_for_normalized_steps_says_where_features_have_died():
  with pytest.raises(ValueError, match="least_features"):
    rules.GradientRule("own", lambda x, linear: linear("w", x), rules.squared_loss, normalized=True)
