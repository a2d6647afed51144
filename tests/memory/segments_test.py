"""Where sequences are cut; logarithmic segments against the reference and against constant ones."""

import itertools

import chex
import jax
import numpy as np
import pytest
import samples
from marks import slow

from mc_jax.memory import rules, segments


def test_constant_segments_and_a_ragged_last_one():
  assert segments.constant(4).lengths(8) == (4, 4)
  assert segments.constant(4).lengths(11) == (4, 4, 3)
  assert segments.constant(4).lengths(3) == (3,)
  assert segments.constant(1).lengths(3) == (1, 1, 1)


@pytest.mark.parametrize("length", [1, 2, 37, 64, 1000, 2**20 - 1])
def test_logarithmic_segments_are_the_binary_digits(length):
  lengths = segments.logarithmic().lengths(length)
  assert sum(lengths) == length
  assert len(lengths) == bin(length).count("1")
  assert all(n & (n - 1) == 0 for n in lengths)
  assert list(lengths) == sorted(lengths, reverse=True)


def test_the_example_of_the_paper():
  assert segments.logarithmic().lengths(37) == (32, 4, 1)


@pytest.mark.parametrize("length", [0, -3])
def test_a_segment_is_at_least_a_token(length):
  with pytest.raises(ValueError, match=r"segment length must be at least 1 token, got -?\d"):
    segments.constant(length)


def test_runs_index_and_tiles():
  lengths = (4, 4, 4, 2, 1, 1)
  assert segments.runs(lengths) == [(4, 3), (2, 1), (1, 2)]
  chex.assert_trees_all_equal(segments.index((2, 3, 1)), np.array([0, 0, 1, 1, 1, 2], np.int32))
  assert segments.tiles(lengths, 6) == (8, 6, 2)  # each at least 6 tokens but the last
  assert segments.tiles(lengths, 1) == lengths
  assert segments.tiles(lengths, 100) == (16,)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
  ("rule", "aggregation", "carry"),
  [
    slow(rules.get("titans", chunk=4, expansion=2), "grm", "checkpoint"),
    (rules.get("swla", chunk=2), "soup", "checkpoint"),
    slow(rules.get("dla", chunk=4, expansion=2), "ssc", "independent"),
    (rules.get("linear", chunk=2), "residual", "independent"),
  ],
  ids=lambda x: getattr(x, "name", x),
)
def test_logarithmic_segments_give_what_the_reference_gives(rule, aggregation, carry):
  x = samples.inputs(rule, batch=2, length=7)  # 4, 2, 1
  options = dict(rule=rule, aggregation=aggregation, carry=carry, segmentation=segments.logarithmic())
  samples.assert_equals_reference(x, top_k=1, **options)


@pytest.mark.parametrize(("name", "aggregation", "carry"), samples.COMBINATIONS)
def test_a_logarithmic_cut_runs_as_a_constant_one_that_falls_on_the_same_tokens(name, aggregation, carry):
  """Six tokens are cut into 4 and 2 either way. One program, forward, hence backward: nothing is left to compile."""
  rule = rules.get(name, chunk=4)
  x = samples.inputs(rule, batch=1, length=6, heads=1, head_dim=2)
  options = dict(rule=rule, aggregation=aggregation, carry=carry)
  programs = [
    str(jax.make_jaxpr(lambda x, cut=cut: samples.call(x, segmentation=cut, **options))(x))
    for cut in (segments.logarithmic(), segments.constant(4))
  ]
  assert programs[0] == programs[1]


def test_combinations_differ():
  """The comparison above could fail: programs of different cuts and names do."""
  rule = rules.get("linear", chunk=4)
  x = samples.inputs(rule, batch=1, length=6, heads=1, head_dim=2)
  programs = {
    str(jax.make_jaxpr(lambda x, a=a, c=c: samples.call(x, segmentation=c, rule=rule, aggregation=a))(x))
    for a, c in itertools.product(("grm", "ssc"), (segments.logarithmic(), segments.constant(3)))
  }
  assert len(programs) == 4
