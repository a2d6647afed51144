"""Prefill and steps against the forward pass of the whole sequence, from every split point at once."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples
from marks import slow

from mc_jax import memory
from mc_jax.bench import cache_errors
from mc_jax.memory import decode

COMBINATIONS = list(itertools.product(samples.GRADIENT_RULES, memory.AGGREGATIONS, memory.CARRIES))


def options_of(rule, aggregation, carry, **changes):
  options = dict(rule=memory.rules.get(rule, chunk=samples.CHUNK), aggregation=aggregation, carry=carry)
  options |= dict(segmentation=memory.segments.constant(samples.SEGMENT), capacity=5) | changes
  return decode.Options(**options)


def forward(options, x, **changes):
  """The whole sequence: [b, length, heads, head_dim]."""
  return memory.memory_caching(
    *x[:6],
    rule=options.rule,
    aggregation=options.aggregation,
    segmentation=options.segmentation,
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
  y, cache = decode.prefill(options, x.tokens(), x.init, lengths=lengths)

  def body(_, carry):
    y, cache = carry
    token, active = tokens_at(x, cache.position), cache.position < length
    at = jnp.where(active, cache.position, length)
    answer, cache = decode.step(options, token.tokens(), x.init, cache, active=active)
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


@pytest.mark.parametrize(
  ("rule", "aggregation", "carry"),
  [
    ("linear", "grm", "checkpoint"),
    ("swla", "grm", "checkpoint"),
    slow("dla", "grm", "checkpoint"),
    slow("titans", "grm", "checkpoint"),
    ("titans", "none", "independent"),
    slow("titans", "residual", "independent"),
    slow("titans", "grm", "independent"),
    slow("titans", "soup", "independent"),
    ("titans", "ssc", "independent"),
  ],
)
def test_every_split_point_in_float32(rule, aggregation, carry):
  check(options_of(rule, aggregation, carry), 1e-4, np.float32)


@pytest.mark.parametrize(
  ("chunk", "carry"),
  [  # chunks of 4 are ragged: 4 tokens, then 2
    slow(4, "checkpoint"),
    slow(3, "checkpoint"),
    slow(3, "independent"),
  ],
)
def test_every_split_point_of_a_rule_that_solves_in_its_chunks(float64, chunk, carry):
  options = options_of("titans", "grm", carry)
  rule = memory.rules.get("titans", chunk=chunk, normalized=True)
  check(dataclasses.replace(options, rule=rule), 1e-9, np.float64)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("carry", "cache_dtype"), [("checkpoint", None), ("independent", "bfloat16"), ("checkpoint", "int8")]
)
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


VARIANTS = [
  ("grm", {"gate": "sigmoid", "gate_scale": 3.0}),
  ("soup", {"gate": "token"}),
  slow("grm", {"gate": "token"}),
  slow("soup", {"gate": "uniform"}),
  slow("grm", {"gate": "constant"}),
  ("ssc", {"pool": "sum", "top_k": 1}),
  slow("ssc", {"gate": "token", "top_k": 3}),
  slow("ssc", {"top_k": 99}),
]


@pytest.mark.parametrize(("aggregation", "changes"), VARIANTS, ids=str)
def test_gates_and_pools(float64, aggregation, changes):
  ages = 5 if changes.get("gate") == "token" else None
  check(options_of("dla", aggregation, "checkpoint", **changes), 1e-9, np.float64, ages)


@pytest.mark.parametrize("aggregation", [slow("grm"), slow("soup"), "ssc"])
def test_a_full_cache_forgets_the_oldest(float64, aggregation):
  """Segments that start from M_0: what two slots hold is what a sequence of the last two segments would."""
  kept = options_of("titans", aggregation, "independent", capacity=2)
  x = samples.inputs(kept.rule, batch=1)
  found, _ = samples.numpy(samples.jit(functools.partial(continued, kept)))(rows_alike(x, 2), np.array([3, 20]))
  run = samples.numpy(samples.jit(functools.partial(forward, kept)))
  for segment in range(5):
    first, last = max(segment - 2, 0) * samples.SEGMENT, min((segment + 1) * samples.SEGMENT, samples.LENGTH)
    expected = run(samples.map_tokens(lambda a, first=first, last=last: a[:, first:last], x))
    tokens = last - segment * samples.SEGMENT
    np.testing.assert_allclose(found[0, last - tokens : last], expected[0, -tokens:], rtol=1e-9, atol=1e-9)
  # A prompt that fills the cache more than once leaves the same states, wherever they lie.
  np.testing.assert_allclose(found[1, 20:], found[0, 20:], rtol=1e-9, atol=1e-9)


def test_bfloat16_tokens_are_cached_as_they_are_multiplied():
  options = options_of("titans", "grm", "checkpoint")
  x = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), samples.inputs(options.rule, batch=1))
  expected = samples.jit(functools.partial(forward, options))(x)
  run = samples.jit(functools.partial(continued, options))
  found, cache = run(jax.tree.map(jnp.asarray, rows_alike(x, 3)), np.array([2, 11, 25]))
  assert {leaf.dtype for leaf in jax.tree.leaves(cache.memories)} == {jnp.dtype("bfloat16")}
  assert {leaf.dtype for leaf in jax.tree.leaves(cache.state.memory)} == {jnp.dtype("float32")}
  scale = np.abs(np.asarray(expected, np.float32)).max()
  np.testing.assert_allclose(
    *(np.asarray(y, np.float32) for y in (found, np.repeat(expected, 3, 0))), atol=0.04 * scale
  )


def test_rows_that_are_not_active_stay_as_they_are():
  options = options_of("swla", "ssc", "checkpoint")
  x = samples.inputs(options.rule, batch=2)
  x = jax.tree.map(lambda a: a.astype(np.float32), x)
  prompt = samples.map_tokens(lambda a: a[:, :6], x)  # at a segment's end: an active row caches its state
  _, before = samples.jit(lambda p: decode.prefill(options, p.tokens(), p.init))(prompt)
  before = before._replace(memories=jax.tree.map(jnp.zeros_like, before.memories))  # nobody looks into them yet
  token = samples.map_tokens(lambda a: a[:, 6:7], x)
  step = samples.jit(lambda t, cache, active: decode.step(options, t.tokens(), t.init, cache, active=active))
  _, after = step(token, before, np.array([False, True]))
  for name in ("position", "state", "chunk", "keys"):
    old, new = (jax.tree.leaves(getattr(cache, name)) for cache in (before, after))
    for a, b in zip(old, new, strict=True):
      np.testing.assert_array_equal(a[0], b[0])
      assert not np.array_equal(a[1], b[1])
  for a, b in zip(jax.tree.leaves(before.memories), jax.tree.leaves(after.memories), strict=True):
    np.testing.assert_array_equal(a[:, 0], b[:, 0])
    assert not np.array_equal(a[0, 1], b[0, 1])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"aggregation": "mean"}, "aggregation must be one of"),
    ({"segmentation": memory.segments.logarithmic()}, "only constant segments can be decoded"),
    ({"capacity": 0}, "capacity must be at least 1, got 0"),
    ({"cache_dtype": "int4"}, "cache_dtype must be one of None, float32, bfloat16, int8; got 'int4'"),
  ],
)
def test_options_that_cannot_be_are_named(changes, message):
  options = {"aggregation": "grm", "carry": "checkpoint"} | changes
  with pytest.raises(ValueError, match=message):
    options_of("linear", **options)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda x: samples.map_tokens(lambda a: jnp.repeat(a, 2, axis=1), x), r"\(2, 1, 2, 4\), as the cache has it; got"),
    (lambda x: samples.map_tokens(lambda a: a[:1], x), r"\(2, 1, 2, 4\), as the cache has it; got \(1, 1"),
    (lambda x: x._replace(k=x.k[..., :1]), "k must have q's shape"),
    (lambda x: x._replace(gates={}), "needs gates"),
  ],
)
def test_a_token_that_does_not_fit_the_cache(change, message):
  options = options_of("titans", "grm", "checkpoint")
  x = samples.inputs(options.rule, batch=2)
  _, cache = jax.eval_shape(lambda x: decode.prefill(options, x.tokens(), x.init), x)
  token = change(samples.map_tokens(lambda a: a[:, :1], x))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda token, cache: decode.step(options, token.tokens(), token.init, cache), token, cache)


def test_a_cache_that_is_too_small_is_refused_before():
  decode.require_room(6, 2, 18)
  with pytest.raises(decode.CacheFull, match="19 tokens in segments of 6 need a capacity of 3 segments, got 2"):
    decode.require_room(6, 2, 19)
  assert [decode.capacity_for(6, tokens) for tokens in (1, 6, 7, 18, 19)] == [1, 1, 2, 3, 4]


@pytest.mark.slow
def test_what_a_caches_dtype_costs():
  """At least what makes the dtype matter, at most a rounding or two of every weight."""
  for found in cache_errors.errors("linear").values():
    assert 1e-4 < found["bfloat16"] < 2**-8
    assert 1e-3 < found["int8"] < 1 / 127
