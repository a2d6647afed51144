"""Matrix memories with decay and the delta rule, and mLSTM: the printed recurrences, whatever the chunk."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples
from marks import slow

from mc_jax import memory
from mc_jax.memory import decode, rules, segments
from mc_jax.parallel import context, mesh

NAMES = tuple(name for name in memory.RULES if name not in samples.GRADIENT_RULES)
FLOAT64 = pytest.mark.usefixtures("float64")

# Each with something that the others have not: a solve, channels, what a state is scaled by, momentum, two keys.
QUICK = {
  ("gated_deltanet", "grm", "checkpoint"),
  ("kda", "soup", "independent"),
  ("mlstm", "residual", "checkpoint"),
  ("momentum_deltanet", "none", "checkpoint"),
  ("rwkv7", "ssc", "checkpoint"),
}
COMBINATIONS = [
  pytest.param(*names, id="-".join(names), marks=[] if names in QUICK else [pytest.mark.slow])
  for names in itertools.product(NAMES, memory.AGGREGATIONS, memory.CARRIES)
  if names[:2] != ("mlstm", "soup")
]
SEGMENTS = segments.constant(samples.SEGMENT)


def some(*quick):
  """Every rule, those that are not quick marked slow."""
  return pytest.mark.parametrize("name", [name if name in quick else slow(name) for name in NAMES])


@FLOAT64
@pytest.mark.parametrize(("name", "aggregation", "carry"), COMBINATIONS)
def test_chunks_with_documents_are_the_printed_recurrence_and_its_gradients(name, aggregation, carry):
  rule = rules.get(name, chunk=samples.CHUNK)
  options = dict(rule=rule, aggregation=aggregation, carry=carry, segmentation=SEGMENTS)
  samples.assert_equals_reference(samples.inputs(rule, value_dim=6), samples.SEGMENT_IDS, **options)


@FLOAT64
@some("kda", "rwkv7")
def test_the_chunk_changes_no_number(name):
  x = samples.inputs(rules.get(name), batch=1, length=70, head_dim=8)
  if "alpha" in x.gates:  # what fades at once, and what hardly does
    x.gates["alpha"] = np.random.default_rng(1).uniform(0.001, 1, x.gates["alpha"].shape)

  def run(chunk, **options):
    return samples.forward(rule=rules.get(name, chunk=chunk), segmentation=segments.constant(70), **options)(x, None)

  expected = run(64, implementation="reference")
  for chunk in (1, 8, 16, 64):
    chex.assert_trees_all_close(run(chunk), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kda", "gla", "rwkv7", "mlstm", "gated_deltanet"])
def test_fast_and_slow_decays_are_exact_in_float32(name):
  rule = rules.get(name, chunk=128)
  x = samples.inputs(rule, batch=1, length=128, head_dim=8)
  x.gates["alpha"] = np.exp(-(np.random.default_rng(1).uniform(0, 5, x.gates["alpha"].shape) ** 3) / 25)
  options = dict(rule=rule, segmentation=segments.constant(128), aggregation="none")
  with jax.enable_x64(True):
    expected = samples.forward_and_back(**options)(x, None, samples.like(x.q))
  x = jax.tree.map(np.float32, x)
  y, gradient = samples.forward_and_back(**options)(x, None, samples.like(x.q))
  for got, right in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected[1]), strict=True):
    np.testing.assert_allclose(got, right, rtol=0, atol=1e-4 * np.abs(right).max())
  chex.assert_trees_all_close(y, np.float32(expected[0]), rtol=0, atol=1e-5 * np.abs(expected[0]).max())


@pytest.mark.parametrize("name", ["momentum_deltanet", slow("titans"), slow("kda"), slow("gated_deltanet")])
def test_what_is_forgotten_at_once_is_gone_and_nothing_else(name):
  rule = rules.get(name, chunk=8)
  x = jax.tree.map(np.float32, samples.inputs(rule, batch=2, length=16, value_dim=None if name == "titans" else 6))
  x.gates["alpha"] = np.random.default_rng(1).choice(np.float32([0, 1e-30, 1e-10, 1e-3, 1]), x.gates["alpha"].shape)
  options = dict(rule=rule, segmentation=segments.constant(16), aggregation="none")
  y, gradient = samples.forward_and_back(**options)(x, None, samples.like(x.v))
  expected = samples.forward(implementation="reference", **options)(x, None)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kda", "mlstm"])
def test_float16_tokens(name):
  rule = rules.get(name, chunk=16)
  x = jax.tree.map(np.float32, samples.inputs(rule, batch=1, length=32))
  options = dict(rule=rule, segmentation=segments.constant(16), aggregation="grm")
  half = samples.map_tokens(np.float16, x)._replace(gates=x.gates)
  y, gradient = samples.forward_and_back(**options)(half, None, samples.like(half.v))
  np.testing.assert_allclose(y, samples.forward(**options)(x), rtol=0, atol=0.02)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@FLOAT64
@some("kda", "mlstm")
def test_it_decodes_to_the_numbers_of_the_whole_sequence(name):
  rule = rules.get(name, chunk=samples.CHUNK)
  x = samples.inputs(rule, batch=3, value_dim=6)
  options = decode.Options(rule, SEGMENTS, capacity=5)
  expected = samples.forward(rule=rule, segmentation=SEGMENTS)(x)
  lengths = jnp.array([8, 3, 6])
  prompt = samples.map_tokens(lambda a: a[:, :8], x)
  y, cache = samples.jit(lambda x: decode.prefill(options, x.tokens(), x.init, lengths=lengths))(prompt)
  for row, length in enumerate(lengths):
    chex.assert_trees_all_close(y[row, :length], expected[row, :length], rtol=1e-9, atol=1e-9)
  step = samples.jit(lambda token, cache: decode.step(options, token.tokens(), x.init, cache))
  rows = np.arange(3)
  for t in range(15):
    token, cache = step(samples.map_tokens(lambda a, t=t: np.asarray(a)[rows, lengths + t][:, None], x), cache)
    chex.assert_trees_all_close(token[:, 0], expected[rows, lengths + t], rtol=1e-9, atol=1e-9)


@FLOAT64
@some("gated_deltanet")
@pytest.mark.parametrize("carry", ["checkpoint", slow("independent")])
def test_it_is_split_over_devices(name, carry):
  rule = rules.get(name, chunk=samples.CHUNK)
  x = samples.inputs(rule, length=4 * samples.SEGMENT, value_dim=6)
  ids = np.stack(
    [np.repeat([1, 2, 0, 3], [5, 9, 2, 8]), np.repeat([1, 2], [1, 23]), np.ones(24, int), np.zeros(24, int)]
  )
  options = memory.Options(rule, segments.constant(samples.SEGMENT), carry=carry)

  def loss(run):
    def value(x):
      y = run(x.tokens(jnp.asarray(ids)), x.init, options)
      return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    return samples.jit(jax.grad(value, has_aux=True))

  expected = jax.device_get(loss(memory.run)(x))
  with jax.set_mesh(mesh.make(mesh.MeshConfig(data=1, context=4, model=2), jax.devices()[:8])):
    got = jax.device_get(loss(context.run)(x))
  chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-9)


@some("kda")
@pytest.mark.parametrize("carry", ["checkpoint", slow("independent")])
def test_it_runs_as_a_kernel_and_so_does_its_gradient(name, carry):
  rule, ids = rules.get(name, chunk=8), np.array([[1] * 10 + [2] * 22, [1] * 30 + [0] * 2])
  x = jax.tree.map(np.float32, samples.inputs(rule, batch=2, length=32, head_dim=8, value_dim=16))
  options = dict(rule=rule, segmentation=segments.constant(16), carry=carry)
  kernels, xla = (
    samples.forward_and_back(implementation=implementation, **options)(x, ids, x.v)
    for implementation in ("pallas", "xla")
  )
  for a, b in zip(jax.tree.leaves(kernels), jax.tree.leaves(xla), strict=True):  # kernels solve to some 2^-16
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5 * np.abs(b).max())


# What one recurrence is of another.


def answers(name, x, **gates):
  """The reference's, of a rule, with these gates instead of x's."""
  x = x._replace(gates={gate: gates[gate] for gate in rules.get(name).gates})
  return samples.forward(rule=rules.get(name, chunk=samples.CHUNK), segmentation=SEGMENTS, implementation="reference")(
    x, samples.SEGMENT_IDS
  )


@FLOAT64
def test_recurrences_are_special_cases_of_each_other():
  x = samples.inputs(rules.get("momentum_deltanet"))
  alpha, eta = x.gates["alpha"], x.gates["eta"]
  one, channels = np.ones_like(alpha), functools.partial(np.repeat, repeats=4, axis=-1)
  by_channel = {"alpha": channels(alpha[..., None]), "eta": eta}
  pairs = {
    "retention that keeps all is linear attention": (answers("retnet", x, alpha=one), answers("linear", x)),
    "steps of 1 make Mamba-2 a retention": (
      answers("mamba2", x, alpha=alpha, eta=one),
      answers("retnet", x, alpha=alpha),
    ),
    "GLA with equal channels is retention": (answers("gla", x, **by_channel), answers("retnet", x, alpha=alpha)),
    "gated DeltaNet that keeps all is DeltaNet": (
      answers("gated_deltanet", x, alpha=one, eta=eta),
      answers("deltanet", x, eta=eta),
    ),
    "KDA with equal channels is gated DeltaNet": (
      answers("kda", x, **by_channel),
      answers("gated_deltanet", x, alpha=alpha, eta=eta),
    ),
    "gated DeltaNet 2 with equal channels is KDA of smaller values": (
      answers("gdn2", x._replace(v=eta[..., None] * x.v), alpha=by_channel["alpha"], eta=channels(eta[..., None])),
      answers("kda", x, **by_channel),
    ),
    "RWKV-7 that keeps all, and writes what it erases, is DeltaNet": (
      answers("rwkv7", x, alpha=channels(one[..., None]), eta=channels(eta[..., None]), write=channels(eta[..., None])),
      answers("deltanet", x, eta=eta),
    ),
    "half a step of the squared loss, without momentum, is a delta": (
      answers("momentum_deltanet", x, alpha=one, beta=0 * one, eta=eta / 2),
      answers("deltanet", x, eta=eta),
    ),
  }
  for what, (a, b) in pairs.items():
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=what)


@FLOAT64
def test_mlstm_is_normalised_gated_attention_and_its_scale_is_of_no_account():
  x = samples.inputs(rules.get("mlstm"), batch=1, length=6, heads=1)
  x = x._replace(init={"w": np.zeros((1, 4, 4)), "n": np.zeros((1, 4, 1)), "floor": np.full((1, 1, 1), 0.3)})
  q, k, v, alpha, eta = (a[0, :, 0] for a in (x.q, x.k, x.v, x.gates["alpha"], 3e4 * x.gates["eta"]))
  scores = np.zeros((6, 6))
  for t in range(6):
    for j in range(t + 1):
      scores[t, j] = (q[t] @ k[j]) * eta[j] * np.prod(alpha[j + 1 : t + 1])
  expected = scores @ v / np.maximum(np.abs(scores.sum(1, keepdims=True)), 1)
  x.gates["eta"] = 3e4 * x.gates["eta"]
  for floor, implementation in itertools.product((0.3, 2.0), ("reference", "xla")):
    init = x.init | {"floor": np.full((1, 1, 1), floor)}
    run = samples.forward(
      rule=rules.get("mlstm", chunk=4), aggregation="none", segmentation=SEGMENTS, implementation=implementation
    )
    np.testing.assert_allclose(run(x._replace(init=init), None)[0, :, 0], expected, rtol=1e-12)


def test_gradients_of_mlstm_are_finite_where_little_is_left():
  rule = rules.get("mlstm")
  one = {name: jnp.ones((1, 1, *shape)) for name, shape in {"w": (2, 2), "n": (2, 1), "floor": (1, 1)}.items()}
  for decay in (1e-10, 1e-25, 1e-37, 0.0):  # in float32 the squares of all but the first are 0
    gradient = jax.grad(lambda decay: rule.joined(decay, one, one)["w"].sum())(jnp.full((1, 1, 1, 1), decay))
    np.testing.assert_allclose(gradient, 4.0 if decay else 0.0)

  def nothing(x):  # is held, and the floor was cut to 0
    return rule.network(x, lambda name, x: x @ jnp.zeros((x.shape[-1], 2 if name == "w" else 1))).sum()

  np.testing.assert_array_equal(jax.grad(nothing)(jnp.ones((3, 2))), 0.0)


def test_what_does_not_go_together_is_refused():
  with pytest.raises(
    ValueError, match="aggregation='soup' adds up the weights of memories, and rule 'mlstm' gives each"
  ):
    memory.Options(rules.get("mlstm"), SEGMENTS, aggregation="soup")
  with pytest.raises(ValueError, match="max_step must be positive or None, got 0"):
    rules.get("kda", max_step=0)
  with pytest.raises(ValueError, match="chunk must be at least 1 token, got 0"):
    rules.get("mlstm", chunk=0)
  with pytest.raises(ValueError, match="momentum needs a decay by head"):
    dataclasses.replace(rules.get("kda"), momentum=True)
  with pytest.raises(ValueError, match="step='channel' needs decays='channel'"):
    dataclasses.replace(rules.get("deltanet"), step="channel")
  with pytest.raises(ValueError, match="erases is of delta rules, with curvature=1 and step='channel'"):
    dataclasses.replace(rules.get("gla"), erases="read")
