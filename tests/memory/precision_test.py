"""bfloat16 inputs: how far states, outputs and gradients are off the exact ones, and what stays in float32.

On a TPU a product of bfloat16 operands is exact but for its sum, which is float32's; so is everything else. The
functions round the operands of their products themselves, forwards and backwards, and a CPU adds up in float32: run
there, without the excess precision that lets XLA drop conversions, they compute with a TPU's roundings.
"""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_compile
import samples
from marks import slow

from mc_jax.memory import arithmetic, pallas, rules, segments, xla
from mc_jax.memory.chunk import State
from mc_jax.memory.tokens import Tokens

HEAD_DIM, CHUNK, SEGMENT = 32, 64, 256
jit = functools.partial(jax.jit, compiler_options=quick_compile.options() | {"xla_allow_excess_precision": False})


def roundings(count):
  """The relative error of numbers that were rounded to bfloat16 `count` times in a row, root mean square.

  A rounding is off by up to half of 2^-7 in 1 to 2, which is 2^-7 / sqrt(12) root mean square, and divided by numbers
  that are anywhere there (d log x) 0.85 * 2^-9. Errors that do not know of each other add up as squares do; sums of
  terms that are off like this are off by no more, relative to what they would be if the terms' signs were random.
  """
  return np.sqrt(count) * 0.85 * 2**-9


def distance(a, b):
  """||a - b|| / ||b||."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def stream(rule, length, forgetful=False, seed=0):
  """Inputs of one row and head, bfloat16; gates, near where they start, and M_0 are float32.

  Queries and keys are normalised, values a noisy map of the keys, another every 2,048 tokens. forgetful: alpha and beta
  are 0.8 to 1.
  """
  rng = np.random.default_rng(seed)
  q, k, u = rng.normal(size=(3, length, HEAD_DIM))
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  maps = rng.normal(size=(-(-length // 2048), HEAD_DIM, HEAD_DIM))
  v = np.einsum("nld,nde->nle", k.reshape(len(maps), -1, HEAD_DIM), maps).reshape(length, HEAD_DIM)
  v += 0.2 * rng.normal(size=v.shape)
  gates = {}
  for name, g in rule.gate_init(SEGMENT).items():
    shape = (1, length, 1, HEAD_DIM) if rule.gates[name].per_channel else (1, length, 1)
    gates[name] = g.maximum / (1 + np.exp(-g.bias - 0.5 * rng.normal(size=shape)))
    if forgetful and name in ("alpha", "beta"):
      gates[name] = rng.uniform(0.8, 1, size=(1, length, 1))
  init = rule.init(jax.random.key(1), heads=1, head_dim=HEAD_DIM)
  tokens = (x[None, :, None].astype(jnp.bfloat16) for x in (q, k, v, u))
  return samples.Inputs(*tokens, *jax.tree.map(np.float32, (gates, jax.device_get(init))))


def repeated(rule, length, largest, seed=0):
  """A stream of eight keys that come again and again, and of steps near their maximum, or beyond 1: the hard case.

  Errors of a chunk's tokens then depend on each other as much as they can.
  """
  x, rng = stream(rule, length), np.random.default_rng(seed)
  keys = rng.normal(size=(8, HEAD_DIM))
  keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
  k = jnp.asarray(keys[rng.integers(0, 8, (1, length, 1))], jnp.bfloat16)
  eta = rng.uniform(0.9 * largest, largest, x.gates["eta"].shape)
  return x._replace(k=k, gates=x.gates | {"eta": np.float32(eta)})


def printed(name, **options):
  """The rule as printed: what a normalized one writes depends on what its memory answers, roundings and all."""
  return rules.get(name, **options, **({"normalized": False} if name in ("dla", "titans") else {}))


def in_float64(function, x):
  """function of the same inputs in float64."""
  with jax.enable_x64(True):
    return function(jax.tree.map(np.float64, x))


def last_state(rule, write, x):
  """The state after the last token, each segment going on from the one before."""
  tokens = Tokens(*jax.tree.map(lambda w: jnp.moveaxis(w, 2, 1), x[:5]), None)
  lengths = segments.constant(SEGMENT).lengths(x.q.shape[1])

  def read(memory, q):
    return rule.network(q, lambda name, z: memory.read(name, z, q.dtype))

  @jit
  def run(init, tokens):
    states = write(rule, init, tokens, lengths, read=read, carries=True, side_by_side=1).states
    return jax.tree.map(lambda w: w[-1], State(states.memory, states.momentum))

  return jax.device_get(run(x.init, tokens))


def state_errors(name, forgetful, broken=contextlib.nullcontext):
  """After 16,384 tokens, by the write kernel, perhaps a broken one: memory's and momentum's, layer by layer."""
  rule = printed(name, chunk=CHUNK)
  x = stream(rule, 16_384, forgetful)
  with broken():
    state = last_state(rule, functools.partial(pallas.write, interpret=True), x)
  expected = in_float64(functools.partial(last_state, rule, xla.write), x)
  return [distance(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)]


# What is rounded of a pair that is written: its weight and that weight's two factors; and of a network's, instead of
# the latter, the state and the hidden layer that its error was read through, and its input and its error.
# Of linear, whose weights are 1, nothing is. 256 chunks are then added up in float32, with 256 roundings by 2^-24.
STATE_BOUNDS = {"linear": 2**-20, "swla": roundings(3), "dla": roundings(5), "titans": roundings(5)}
STATE_BOUNDS |= {"gated_deltanet": roundings(3), "kda": roundings(3), "mlstm": roundings(3)}


# Networks would forget themselves; swla is in the forgetful case.
LONG_LIVED = [slow("linear", False), slow("swla", False), slow("dla", False), ("titans", False)]
FORGETFUL = "swla", True


# Delta rules correct themselves, roundings of the state included; so they are not asked what bfloat16 states would do.
CORRECTED = [slow("gated_deltanet", False), slow("kda", False), slow("mlstm", False)]


@pytest.mark.parametrize(("name", "forgetful"), [*LONG_LIVED, FORGETFUL, *CORRECTED])
def test_states_stay_near_the_exact_ones_for_16_384_tokens(name, forgetful):
  errors = state_errors(name, forgetful)
  print(name, "forgetful" if forgetful else "", *(f"{error:.2e}" for error in errors))
  assert max(errors) < STATE_BOUNDS[name]


def repeated_errors(name, largest, broken=contextlib.nullcontext):
  rule = rules.get(name, chunk=CHUNK)
  x = repeated(rule, 16_384, largest)
  with broken():
    state = last_state(rule, functools.partial(pallas.write, interpret=True), x)
  return distance(
    *(leaves.memory["w"] for leaves in (state, in_float64(functools.partial(last_state, rule, xla.write), x)))
  )


# A delta rule writes the difference of a value and of an answer that was read by a product of bfloat16 operands, and
# takes the latter for right: the state is as far off as that answer, every key at every time, until it fades.
REPEATED_BOUND = roundings(30)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda"])
@pytest.mark.parametrize("largest", [1.0, 1.8])
def test_states_stay_near_the_exact_ones_where_keys_repeat(name, largest):
  error = repeated_errors(name, largest)
  print(name, largest, f"{error:.2e}")
  assert error < REPEATED_BOUND


@pytest.mark.slow
def test_states_by_a_solve_of_single_bfloat16_products_would_not(monkeypatch):
  def rough(a, b):
    return jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)

  broken = functools.partial(patched, monkeypatch, arithmetic, "_TPU", arithmetic._TPU._replace(product=rough))
  assert repeated_errors("gated_deltanet", 1.8, broken) > 2 * REPEATED_BOUND


@contextlib.contextmanager
def patched(monkeypatch, *attribute):
  """With an attribute of a module set to something else: (module, name, value)."""
  with monkeypatch.context() as patch:
    patch.setattr(*attribute)
    yield


@pytest.mark.parametrize(("name", "forgetful"), LONG_LIVED)
def test_states_kept_in_bfloat16_would_not(name, forgetful, monkeypatch):
  exact = xla.write_chunk

  def write_chunk(*args, **kwargs):
    state, y = exact(*args, **kwargs)
    return jax.tree.map(lambda w: jax.lax.reduce_precision(w, 8, 7), state), y

  broken = functools.partial(patched, monkeypatch, xla, "write_chunk", write_chunk)
  assert min(state_errors(name, forgetful, broken)) > 2 * STATE_BOUNDS[name]


@pytest.mark.parametrize(("name", "forgetful"), [slow("titans", False), FORGETFUL])
def test_states_by_cumulative_logs_in_bfloat16_would_not(name, forgetful, monkeypatch):
  def sums(x, mask):
    return jax.lax.reduce_precision(arithmetic.product(x[..., None, :], mask, jnp.bfloat16)[..., 0, :], 8, 7)

  broken = functools.partial(patched, monkeypatch, arithmetic, "_exact_product", sums)
  assert max(state_errors(name, forgetful, broken)) > 2 * STATE_BOUNDS[name]


@pytest.mark.parametrize(
  ("name", "aggregation", "implementation"),
  [
    slow("linear", "ssc", "pallas"),
    ("swla", "grm", "pallas"),
    slow("titans", "grm", "pallas"),
    slow("titans", "soup", "pallas"),
    slow("titans", "ssc", "pallas"),
    slow("dla", "grm", "pallas"),
    slow("dla", "soup", "xla"),
    slow("gated_deltanet", "grm", "pallas"),
    slow("kda", "grm", "pallas"),
    slow("mamba2", "grm", "pallas"),
    slow("swla", "residual", "xla"),
  ],
)
def test_outputs_and_gradients_are_near_the_exact_ones(name, aggregation, implementation):
  """An output was rounded as an operand twice at most (a state, and a hidden layer or what attention weighs), and at
  last; with what is rounded before, in the state, and what leaves the write kernel, that is five times. A gradient has
  the forward pass's roundings in what it is multiplied by, a cotangent rounded for a product a layer and on its way
  into the write kernel, and is rounded itself: eleven times.

  A delta rule's has its error's roundings as well, which are those of an answer: twenty times. (mLSTM's answers are
  quotients, and its gradients have no such bound where the normaliser is small.)

  Softmax's gradient, which only u has alone, is made of differences of reads, a tenth of them where memories are alike,
  as those of networks are that have learned little yet.
  """
  rule = printed(name, chunk=CHUNK)
  rows = [stream(rule, 4 * SEGMENT, seed=seed) for seed in range(4)]  # one row's gradient in alpha is a few numbers
  x = samples.map_tokens(lambda *a: np.concatenate(a), *rows)
  cotangent = samples.like(x.q)

  def run(x, implementation=implementation):
    def layer(x):
      options = dict(rule=rule, aggregation=aggregation, segmentation=segments.constant(SEGMENT))
      return samples.call(x, implementation=implementation, **options)

    def value_and_gradient(x):
      y, pull = jax.vjp(layer, x)
      return y, pull(cotangent.astype(y.dtype))[0]

    return jax.device_get(jit(value_and_gradient)(x))

  y, gradient = run(x)
  expected, expected_gradient = in_float64(functools.partial(run, implementation="xla"), x)
  assert y.dtype == jnp.bfloat16
  chex.assert_trees_all_equal_dtypes(gradient, x)
  errors = {
    jax.tree_util.keystr(path): distance(g, e)
    for (path, g), e in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected_gradient), strict=True)
    if np.any(e)
  }
  print(name, aggregation, f"y {distance(y, expected):.2e}", *(f"{n} {error:.2e}" for n, error in errors.items()))
  assert distance(y, expected) < roundings(5)
  assert errors.pop(".u", 0.0) < 10 * roundings(11)
  assert max(errors.values()) < roundings(20 if getattr(rule, "curvature", 0) else 11)


@pytest.mark.parametrize("carry", [True, False])
def test_states_scores_and_summaries_are_float32(carry):
  rule = printed("titans", chunk=8)
  x = stream(rule, 64)
  tokens = Tokens(*jax.tree.map(lambda w: jnp.moveaxis(w, 2, 1), x[:5]), None)
  lengths = segments.constant(16).lengths(64)

  def read(memory, q):
    return rule.network(q, lambda name, z: memory.read(name, z, q.dtype))

  write = functools.partial(xla.write, rule, lengths=lengths, read=read, carries=carry, side_by_side=1)
  written = jax.eval_shape(write, x.init, tokens)
  summarize = functools.partial(xla.summarize, rule, lengths=lengths, kind="mean", side_by_side=1)
  scores, summaries = jax.eval_shape(summarize, tokens)
  assert jax.tree.leaves(written.states)[0].shape[0] == len(summaries) == len(lengths)
  for leaf in jax.tree.leaves((written, scores, summaries)):
    assert leaf.dtype == np.float32
