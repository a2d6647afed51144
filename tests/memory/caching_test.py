"""The public function: the fast path against the reference, causality and documents, for every combination."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples
from marks import slow
from samples import CHUNK

from mc_jax import memory
from mc_jax.memory import rules, segments, xla

pytestmark = pytest.mark.usefixtures("float64")

# What does not depend on each other is covered in pairs, not all with all: options of a rule, pools and gates by carry.
RULES = {
  "checkpoint": {
    "linear": rules.get("linear", chunk=CHUNK),
    "swla": rules.get("swla", chunk=CHUNK),
    "dla": rules.get("dla", chunk=CHUNK, depth=1, max_grad_norm=0.7, normalized=False),
    "titans": rules.get("titans", chunk=CHUNK, expansion=2, max_grad_norm=4.0, normalized=False),
  },
  "independent": {
    "linear": rules.get("linear", chunk=CHUNK),
    "swla": rules.get("swla", chunk=CHUNK, window=3),
    "dla": rules.get("dla", chunk=CHUNK, expansion=2, norm=True, retention=False, max_grad_norm=None, normalized=False),
    "titans": rules.get("titans", chunk=CHUNK, expansion=2, max_grad_norm=None, normalized=False),
  },
}
OPTIONS = {
  "checkpoint": dict(pool="mean", gate="softmax", gate_scale=1.5, top_k=2),
  "independent": dict(pool="sum", gate="sigmoid", top_k=1, segment_group=2),
}
# Matrices have a ragged last segment of a ragged chunk. Networks compile for too long; theirs are further below.
LENGTHS = {"linear": samples.LENGTH, "swla": samples.LENGTH, "dla": 24, "titans": 24}


class Case(NamedTuple):
  """A combination, and what it gives on rows of documents."""

  options: dict
  segment_ids: np.ndarray
  x: samples.Inputs
  cotangent: np.ndarray
  y: np.ndarray
  gradient: samples.Inputs

  def run(self, x, segment_ids, cotangent):
    return samples.forward_and_back(**self.options)(x, segment_ids, cotangent)


def options_of(rule, aggregation, carry):
  segmentation = segments.constant(samples.SEGMENT)
  return dict(
    rule=RULES[carry][rule], aggregation=aggregation, carry=carry, segmentation=segmentation, **OPTIONS[carry]
  )


CASES = [pytest.param(case.values, id=case.id, marks=case.marks) for case in samples.COMBINATIONS]


@pytest.fixture(scope="module", params=CASES)
def case(request):
  """One rule, aggregation and carry; all tests of it share what was compiled."""
  options = options_of(*request.param)
  length = LENGTHS[request.param[0]]
  segment_ids = samples.SEGMENT_IDS[:, :length]
  with jax.enable_x64(True):
    x = samples.inputs(options["rule"], length=length)
    cotangent = samples.like(x.q)
    return Case(options, segment_ids, x, cotangent, *samples.forward_and_back(**options)(x, segment_ids, cotangent))


def test_output_and_gradients_are_the_references(case):
  samples.assert_equals_reference(case.x, case.segment_ids, **case.options)


def test_gradients_are_finite_and_reach_every_input(case):
  chex.assert_tree_all_finite((case.y, case.gradient))
  gradient = case.gradient
  if case.options["aggregation"] in ("none", "residual"):
    chex.assert_trees_all_equal(gradient.u, np.zeros_like(gradient.u))
    gradient = gradient._replace(u=gradient.q)
  for name, g in samples.tokens(gradient).items():
    assert (np.abs(g).max(axis=(0, 1)) > 1e-6).all(), name
  for name, g in gradient.init.items():
    assert (np.abs(g).max(axis=(1, 2)) > 1e-6).all(), name


def test_padding_gets_zeros_and_a_row_of_it_is_nothing(case):
  padding = case.segment_ids == 0
  chex.assert_trees_all_equal(case.y[padding], np.zeros_like(case.y[padding]))
  for g in samples.tokens(case.gradient).values():
    chex.assert_trees_all_equal(g[padding], np.zeros_like(g[padding]))
  x = samples.select(False, case.x, np.nan)
  y, gradient = case.run(x, np.zeros_like(case.segment_ids), case.cotangent)
  chex.assert_trees_all_equal((y, gradient), jax.tree.map(np.zeros_like, (y, gradient)))


def test_nothing_leaks_from_a_later_token(case):
  """Identity 7, with documents: bit for bit, and no gradient flows back in time."""
  length = case.x.q.shape[1]
  other = samples.inputs(case.options["rule"], length=length, seed=5)
  for t in (1, 4, 5, 6, 11, 13, 17, 18, 20, length - 1):
    x = samples.select(np.arange(length) != t, case.x, other)
    y, gradient = case.run(x, case.segment_ids, np.where(np.arange(length)[:, None, None] < t, case.cotangent, 0))
    chex.assert_trees_all_equal(y[:, :t], case.y[:, :t])
    assert (y[2, t] != case.y[2, t]).all()
    for g in samples.tokens(gradient).values():
      chex.assert_trees_all_equal(g[:, t:], np.zeros_like(g[:, t:]))


def test_other_documents_are_as_good_as_padding(case):
  """And what stands at padding does not matter: there it is NaN."""
  init_gradients, documents = [], samples.document_numbers(case.segment_ids)
  for number in range(1, documents.max() + 1):
    own = number == documents
    x = samples.select(own, case.x, np.nan)
    y, gradient = case.run(x, np.where(own, case.segment_ids, 0), case.cotangent)
    chex.assert_trees_all_close(y[own], case.y[own], rtol=1e-11, atol=1e-11)
    chex.assert_trees_all_equal(y[~own], np.zeros_like(y[~own]))
    alone, packed = samples.select(own, gradient, 0), samples.select(own, case.gradient, 0)
    chex.assert_trees_all_equal(samples.tokens(gradient), samples.tokens(alone))
    chex.assert_trees_all_close(samples.tokens(gradient), samples.tokens(packed), rtol=1e-9, atol=1e-9)
    init_gradients.append(gradient.init)
  total = jax.tree.map(lambda *parts: sum(parts), *init_gradients)
  chex.assert_trees_all_close(total, case.gradient.init, rtol=1e-9, atol=1e-9)


def test_a_document_on_a_segment_boundary_gets_what_it_gets_alone(case):
  row, start, stop = 1, 12, 24
  assert start % samples.SEGMENT == 0
  there = np.zeros_like(case.segment_ids)
  there[row, start:stop] = 1
  here = np.roll(there, -start, axis=1)
  x = samples.map_tokens(lambda w: np.roll(w, -start, axis=1), case.x)
  _, packed = case.run(case.x, there, case.cotangent)
  y, gradient = case.run(x, here, np.roll(case.cotangent, -start, axis=1))
  chex.assert_trees_all_close(y[row, : stop - start], case.y[row, start:stop], rtol=1e-11, atol=1e-11)
  packed = samples.map_tokens(lambda w: np.roll(w, -start, axis=1), packed)
  chex.assert_trees_all_close(gradient, packed, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
  ("rule", "aggregation", "carry"),
  [("linear", "ssc", "independent"), slow("swla", "soup", "checkpoint"), slow("titans", "grm", "checkpoint")],
)
def test_gradients_through_the_caches_are_differences(rule, aggregation, carry):
  """Of the fast path itself, along random directions; the tokens of the first segment are felt in the last."""
  options = options_of(rule, aggregation, carry)
  length = LENGTHS[rule]
  x = samples.inputs(options["rule"], length=length)
  cotangent = np.where(np.arange(length)[:, None, None] >= 18, samples.like(x.q), 0)
  run = samples.forward_and_back(**options)
  early = samples.select(np.arange(length) < 6, samples.like(x, seed=3), 0)
  documents = samples.SEGMENT_IDS[:, :length]
  for segment_ids in (documents, np.ones_like(documents)):
    expected = samples.derivatives(lambda x: np.vdot(run(x, segment_ids, cotangent)[0], cotangent), x, early)
    _, gradient = run(x, segment_ids, cotangent)
    chex.assert_trees_all_close(samples.along(gradient, early), expected, rtol=1e-6, atol=1e-6)
  felt = {name for name, derivative in expected.items() if abs(derivative) > 1e-3}
  assert felt >= {".k", ".v"}


@pytest.mark.parametrize(
  ("rule", "aggregation", "carry", "segment"),
  [
    slow(rules.get("swla", chunk=2), "soup", "checkpoint", 5),  # ragged chunks in ragged segments
    slow(rules.get("linear", chunk=2), "ssc", "independent", 5),
    slow(rules.get("titans", chunk=2, expansion=2, normalized=False), "grm", "checkpoint", 4),
    slow(rules.get("dla", chunk=4, expansion=2, normalized=False), "grm", "independent", 4),
    (rules.get("dla", chunk=4, expansion=2, normalized=False), "residual", "checkpoint", 1),  # every token is cached
    (rules.get("swla", chunk=13), "soup", "checkpoint", 13),  # nothing is cached
    slow(rules.get("titans", chunk=13, expansion=2, normalized=False), "ssc", "independent", 64),
  ],
  ids=lambda x: getattr(x, "name", str(x)),
)
def test_every_cut_gives_what_the_reference_gives(rule, aggregation, carry, segment):
  x = samples.inputs(rule, batch=2, length=13, heads=1)
  options = dict(rule=rule, aggregation=aggregation, carry=carry, segmentation=segments.constant(segment))
  samples.assert_equals_reference(x, **options)


def test_queries_are_read_in_tiles_of_several_segments():
  rule = rules.get("linear", chunk=10)
  x = samples.inputs(rule, batch=1, length=350, heads=1)
  assert segments.tiles((40,) * 8 + (30,), xla.QUERY_TILE) == (160, 160, 30)
  samples.assert_equals_reference(x, rule=rule, aggregation="grm", segmentation=segments.constant(40))


@pytest.mark.parametrize("aggregation", ["grm", slow("soup")])
def test_how_many_independent_segments_run_side_by_side_is_a_matter_of_speed(aggregation):
  rule = rules.get("linear", chunk=2)
  x, segment_ids = samples.inputs(rule, batch=2, length=13), np.array([[1] * 7 + [2] * 6, [1] * 2 + [0] + [2] * 10])
  options = dict(rule=rule, aggregation=aggregation, segmentation=segments.constant(2), carry="independent")
  y = samples.forward(segment_group=1, **options)(x, segment_ids)
  for group in (3, 4, 100):
    chex.assert_trees_all_close(
      samples.forward(segment_group=group, **options)(x, segment_ids), y, rtol=1e-9, atol=1e-9
    )


SIZES = dict(head_dim=32, expansion=4, segment=128, chunk=8)


def temporary_bytes(aggregation, length):
  """What one layer's training step takes beside its inputs and gradients, float32, batch and heads 1."""
  rule = rules.get("titans", chunk=SIZES["chunk"], expansion=SIZES["expansion"], normalized=False)
  x = samples.inputs(rule, batch=1, length=length, heads=1, head_dim=SIZES["head_dim"])
  x = jax.tree.map(lambda w: w.astype(np.float32), x)
  segmentation = segments.constant(SIZES["segment"])

  def loss(x):
    return samples.call(x, rule=rule, aggregation=aggregation, segmentation=segmentation).sum()

  return samples.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["grm", slow("soup"), slow("ssc")])
def test_a_training_steps_memory_grows_with_the_states_and_not_with_length_times_state(aggregation):
  """Of every segment its state, its gradient and one copy; of every token some vectors; of one segment its chunks.

  A soup writes once for each of the memory's two layers and both times keeps the states, and what is between the layers
  is an array of every token's.
  """
  short, long = (temporary_bytes(aggregation, length) for length in (512, 1024))
  head_dim = SIZES["head_dim"]
  vector = 4 * head_dim
  state = 2 * 4 * 2 * head_dim * SIZES["expansion"] * head_dim  # two layers, and as much momentum
  chunks = SIZES["segment"] // SIZES["chunk"]

  def bound(length):
    states, vectors = (4, 24 + 2 * SIZES["expansion"]) if aggregation == "soup" else (3, 24)
    return states * state * length // SIZES["segment"] + vectors * vector * length

  assert long - short < bound(1024 - 512)
  assert long < bound(1024) + 8 * state * chunks
  # The bound means something: it has no room for a state of every chunk.
  assert bound(1024) < state * 1024 // SIZES["chunk"]


def test_what_is_differentiated_may_change():
  """Of what was traced once, gradients in some arrays and then in others (JAX keeps what the first one left)."""
  rule = rules.get("titans", chunk=2, expansion=2)
  x = samples.inputs(rule, batch=1, length=8, head_dim=4)
  options = memory.Options(rule, segments.constant(4))

  def loss(q, gates, init):
    return jnp.square(memory.run(x._replace(q=q, gates=gates).tokens(), init, options)).sum()

  args = jax.tree.map(np.float32, (x.q, x.gates, x.init))
  apart = [jax.eval_shape(jax.grad(loss, argnums=i), *args) for i in (2, 0, 1)]
  together = jax.eval_shape(jax.grad(loss, argnums=(2, 0, 1)), *args)
  chex.assert_trees_all_equal_shapes_and_dtypes(tuple(apart), together)
