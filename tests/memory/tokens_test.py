"""What memory_caching refuses, and what it says: the argument's name and what would do. Nothing is compiled."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import samples

from mc_jax.memory import rules, segments

RULE = rules.get("titans", chunk=2, expansion=2)
SHAPE = (2, 5, 3, 4)  # batch, length, heads, head_dim


def call(rule=RULE, inputs=(), **options):
  x = samples.inputs(rule, batch=2, length=5, heads=3, head_dim=4)._replace(**dict(inputs))
  return samples.call(x, **dict(rule=rule, segmentation=segments.constant(2)) | options)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(segmentation=2), "segmentation must be segments.constant(length) or segments.logarithmic(), got 2"),
    (dict(aggregation="mean"), "aggregation must be one of none, residual, grm, soup, ssc; got 'mean'"),
    (dict(carry="both"), "carry must be one of checkpoint, independent; got 'both'"),
    (dict(pool="max"), "pool must be one of mean, sum; got 'max'"),
    (dict(gate="tanh"), "gate must be one of softmax, sigmoid, constant, uniform, token; got 'tanh'"),
    (dict(implementation="pallas_gpu"), "implementation must be one of None, xla, pallas, reference"),
    (dict(top_k=0), "top_k must be at least 1, got 0"),
    (dict(segment_group=0), "segment_group must be at least 1, got 0"),
    (dict(gate_scale=0.0), "gate_scale must be positive, got 0.0"),
    (dict(gate_scale=-1.0), "gate_scale must be positive, got -1.0"),
    (dict(gate="token"), "token_scores [batch, length, heads, ages] = (2, 5, 3) with at least 3 ages"),
  ],
  ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_names_and_sizes(options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call(**options)


def test_a_rule_is_more_than_its_name():
  with pytest.raises(ValueError, match=r"rule must come from rules\.get, got 'titans'"):
    samples.call(samples.inputs(RULE), rule="titans", segmentation=segments.constant(2))


@pytest.mark.parametrize("shape", [(2, 5, 3, 2), (1, 5, 3, 3), (2, 5, 3)])
def test_token_scores_have_an_age_for_every_segment(shape):
  message = f"token_scores [batch, length, heads, ages] = (2, 5, 3) with at least 3 ages, one a segment; got {shape}"
  with pytest.raises(ValueError, match=re.escape(message)):
    call(gate="token", inputs={"token_scores": np.zeros(shape)})


@pytest.mark.parametrize("shape", [(5, 3, 4), (2, 0, 3, 4), (2, 5, 3, 0)])
def test_q_has_four_axes_and_none_is_empty(shape):
  with pytest.raises(
    ValueError, match=re.escape(f"q must be [batch, length, heads, head_dim], none of them 0; got shape {shape}")
  ):
    call(inputs={"q": np.zeros(shape)})


@pytest.mark.parametrize("name", ["k", "v", "u"])
def test_keys_values_and_connectors_are_like_queries(name):
  expected = f"{name} must have q's shape {SHAPE}"
  if name == "v":
    expected = f"v must be [batch, length, heads, value_dim] = {SHAPE}, as wide as the answers of init's weights"
  with pytest.raises(ValueError, match=re.escape(f"{expected}; got (2, 5, 3, 8)")):
    call(inputs={name: np.zeros((2, 5, 3, 8))})
  with pytest.raises(ValueError, match=f"{name} must be floating point; got int32"):
    call(inputs={name: np.zeros(SHAPE, np.int32)})


def test_gates_are_the_rules():
  gates = {name: np.ones((2, 5, 3)) for name in RULE.gates}
  with pytest.raises(
    ValueError, match=re.escape("rule 'titans' needs gates ['alpha', 'beta', 'eta']; got ['alpha', 'eta']")
  ):
    call(inputs={"gates": {name: gates[name] for name in ("alpha", "eta")}})
  with pytest.raises(
    ValueError, match=re.escape("gates['eta'] must be [batch, length, heads] = (2, 5, 3); got (2, 5, 1)")
  ):
    call(inputs={"gates": gates | {"eta": np.ones((2, 5, 1))}})


def test_init_is_of_the_heads():
  with pytest.raises(ValueError, match=re.escape("init['w1'] must be [heads, in, out] with 3 heads; got (2, 4, 8)")):
    call(inputs={"init": {"w1": np.zeros((2, 4, 8)), "w2": np.zeros((2, 8, 4))}})


@pytest.mark.parametrize("segment_ids", [jnp.ones((2, 4), jnp.int32), jnp.ones((2, 5))], ids=["shape", "dtype"])
def test_segment_ids_are_integers_by_token(segment_ids):
  with pytest.raises(ValueError, match=re.escape("segment_ids must be integers [batch, length] = (2, 5); got")):
    call(segment_ids=segment_ids)


def test_documents_are_not_cut_by_the_rows_length():
  with pytest.raises(ValueError, match=r"segment_ids .* need segmentation constant: logarithmic cuts by the row's"):
    call(segmentation=segments.logarithmic(), segment_ids=np.ones((2, 5), np.int32))
