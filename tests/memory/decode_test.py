"""Prefill and steps against the forward pass of the whole sequence, from every split point at once."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples

from mc_jax import memory
from mc_jax.memory import decode

COMBINATIONS = list(itertools.product(memory.RULES, memory.AGGREGATIONS, memory.CARRIES))


def options_of(rule, aggregation, carry, **changes):
  options = dict(segment_length=samples.SEGMENT, capacity=5, aggregation=aggregation, carry=carry) | changes
  return decode.Options(memory.rules.get(rule, chunk=samples.CHUNK), **options)


def forward(options, x, **changes):
  """The whole sequence: [b, length, heads, head_dim]."""
  return memory.memory_caching(
    *x[:6],
    rule=options.rule,
    aggregation=options.aggregation,
    segmentation=memory.segments.constant(options.segment_length),
    carry=options.carry,
    top_k=options.top_k,
    pool=options.pool,
    gate=options.gate,
    gate_scale=options.gate_scale,
    token_scores=x.token_scores,
    **changes,
  )


def tokens_at(x, position):
  """The token of each row at its position [b], or the last."""
  length = x.q.shape[1]
  rows = jnp.arange(len(position))
  return samples.map_tokens(lambda a: a[rows, jnp.minimum(position, length - 1)][:, None], x)


def continued(options, x, lengths):
  """Prompts of `lengths` [b], then steps to the end: the answers of all tokens, and the cache."""
  length = x.q.shape[1]
  y, cache = decode.prefill(options, *x[:6], lengths=lengths, token_scores=x.token_scores)

  def body(_, carry):
    y, cache = carry
    token, active = tokens_at(x, cache.position), cache.position < length
    at = jnp.where(active, cache.position, length)
    answer, cache = decode.step(options, *token[:6], cache, token_scores=token.token_scores, active=active)
    return y.at[jnp.arange(len(y)), at].set(answer[:, 0], mode="drop"), cache

  return jax.lax.fori_loop(0, length - lengths.min(), body, (y, cache))


def rows_alike(x, rows):
  """The first row, so many times."""
  return samples.map_tokens(lambda a: np.repeat(a[:1], rows, 0), x)


def check(options, tolerance, dtype, ages=None, length=samples.LENGTH):
  """Every prompt length, each a row of one batch; to the end by steps."""
  x = samples.inputs(options.rule, batch=1, length=length, ages=ages)
  x = jax.tree.map(lambda a: a.astype(dtype), x)
  expected = samples.numpy(samples.jit(functools.partial(forward, options)))(x)
  run = samples.jit(functools.partial(continued, options))
  found, cache = samples.numpy(run)(rows_alike(x, length), np.arange(1, length + 1))
  assert found.dtype == dtype
  np.testing.assert_allclose(found, np.repeat(expected, length, 0), rtol=tolerance, atol=tolerance)
  assert (cache.position == length).all()


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "aggregation", "carry"), COMBINATIONS)
def test_every_split_point_equals_the_forward_pass(float64, rule, aggregation, carry):
  check(options_of(rule, aggregation, carry), 1e-9, np.float64)


@pytest.mark.parametrize("rule", memory.RULES)
def test_every_split_point_in_float32(rule):
  check(options_of(rule, "grm", "checkpoint"), 1e-4, np.float32)


@pytest.mark.parametrize("cache_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("carry", memory.CARRIES)
def test_states_in_host_memory_are_those_on_the_device(cache_dtype, carry):
  """Bit for bit, through prompts of every length and 40 steps and more, dropping the oldest states."""
  rule, length = "titans", 4 + 40
  options = options_of(rule, "ssc", carry, cache_dtype=cache_dtype)
  x = samples.inputs(options.rule, batch=4, length=length)
  x = jax.tree.map(lambda a: a.astype(np.float32), x)
  lengths = np.array([1, 4, 3, 2])
  found = {}
  for place in decode.MEMORIES:
    here = dataclasses.replace(options, memory=place)
    y, cache = samples.jit(functools.partial(continued, here))(x, lengths)
    kinds = {w.sharding.memory_kind for w in jax.tree.leaves(cache.memories)}
    assert kinds == {"device"} if place == "device" else "pinned_host" in kinds
    found[place] = jax.device_get((y, cache._replace(memories=None)))
  jax.tree.map(np.testing.assert_array_equal, found["host"], found["device"])


def test_only_what_selects_may_lie_in_host_memory():
  with pytest.raises(ValueError, match="memory='host' needs aggregation='ssc'"):
    options_of("linear", "grm", "checkpoint", memory="host")
