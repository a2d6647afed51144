"""A rule of a user's own, registered from outside the package, gets everything else from it.

The rule is one that the package has not: a matrix whose key channels each fade at a rate of their own (gated linear
attention, arXiv:2312.06635), M_t = diag(a_t) M_{t-1} + eta_t k_t (x) v_t.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import samples
from flax import nnx
from marks import slow

from mc_jax import memory
from mc_jax.memory import arithmetic, decode, networks, rules, segments
from mc_jax.memory.arithmetic import column, product
from mc_jax.memory.chunk import State
from mc_jax.memory.documents import visible
from mc_jax.models import CacheConfig, LanguageModel, MemoryConfig, ModelConfig
from mc_jax.parallel import context, mesh

FLOAT64 = pytest.mark.usefixtures("float64")


class Online(NamedTuple):
  """x_t W_t = (x_t o D_t) W_0 + sum_j <x_t o D_t, eta_j k_j / D_j> v_j, D_t the product of a up to t."""

  start: State
  fresh: dict
  incoming: jax.Array | None
  same: jax.Array
  decay: jax.Array
  keys: jax.Array
  v: jax.Array

  def read(self, name, x, dtype):
    x = x * self.decay
    y = product(x, self.start.memory[name], dtype)
    if self.incoming is not None:
      y = jnp.where(self.incoming, y, product(x, self.fresh[name], dtype))
    return y + product(jnp.where(self.same, arithmetic.gram(x, self.keys, dtype), 0.0), self.v, dtype)


@dataclasses.dataclass(frozen=True)
class Fading(rules.Rule):
  chunk: int = 8  # rates above e^-5 a token keep 1 / D finite
  name = "fading"
  network = networks.Matrix()
  transition = "channel"

  @property
  def gates(self):
    return {"alpha": rules.Gate(per_channel=True), "eta": rules.Gate()}

  def init(self, key, *, heads, head_dim, value_dim=None):
    return self.network.init(key, heads, head_dim, value_dim)

  def gate_init(self, segment_length):
    return {"alpha": rules.GateInit(math.log(segment_length)), "eta": rules.GateInit(0.0)}

  def start(self, fresh, k):
    return State({name: jnp.broadcast_to(w, (len(k), *w.shape)) for name, w in fresh.items()})

  def write(self, start, fresh, k, v, gates, documents, *, solve, chunk=None):
    seen = visible(documents, k.shape[-2])
    wide = arithmetic.state_dtype(k.dtype)
    logs = product(seen.same, jnp.log(gates["alpha"].astype(wide)), wide)
    decay, keys = jnp.exp(logs), column(gates["eta"].astype(wide)) * k * jnp.exp(-logs)
    memory = start.memory["w"]
    if seen.continues is not None:
      memory = jnp.where(seen.continues, memory, fresh["w"])
    last = jnp.where(column(seen.same[..., -1, :].astype(wide)) > 0, keys, 0.0)
    memory = column(decay[..., -1, :]) * (memory + product(jnp.swapaxes(last, -1, -2), v, wide))
    return State({"w": memory}), Online(start, fresh, seen.incoming, seen.same, decay, keys, v)

  def decay(self, gates, dtype):
    return jnp.exp(jnp.log(gates["alpha"].astype(dtype)).sum(-2))[..., None]

  def token_start(self, fresh):
    return State(fresh)

  def token(self, state, fresh, k, v, gates, chunk_begins):
    return State({"w": gates["alpha"][:, None] * state.memory["w"] + gates["eta"] * jnp.outer(k, v)})


@dataclasses.dataclass(frozen=True)
class Frozen(Fading):
  """The same, which has decoding keep what came before in a chunk, as rules of networks do, and needs none of it."""

  frozen = True

  def begin(self, state, tokens, dtype):
    return jnp.zeros(state.memory["w"].shape[:2])

  def within(self, online):
    return online.decay.sum((-1, -2)) * 0

  def advance(self, chunk, place, online, gates):
    return chunk


RULE = Fading(chunk=samples.CHUNK)


@pytest.fixture(scope="module", autouse=True)
def _registered():
  rules.register("fading", Fading)
  yield
  del rules._RULES["fading"]


@FLOAT64
@pytest.mark.parametrize(
  ("aggregation", "carry"), [("grm", "checkpoint"), slow("ssc", "independent"), slow("soup", "checkpoint")]
)
def test_it_is_its_recurrence_with_documents_and_gradients(aggregation, carry):
  options = dict(rule=RULE, aggregation=aggregation, carry=carry, segmentation=segments.constant(samples.SEGMENT))
  samples.assert_equals_reference(samples.inputs(RULE), samples.SEGMENT_IDS, **options)


@pytest.mark.slow
def test_it_runs_as_a_kernel_and_so_does_its_gradient():
  rule, ids = Fading(chunk=8), np.array([[1] * 10 + [2] * 22, [1] * 30 + [0] * 2])
  x = jax.tree.map(np.float32, samples.inputs(rule, batch=2, length=32, head_dim=8))
  options = dict(rule=rule, segmentation=segments.constant(16))
  kernels, xla = (
    samples.forward_and_back(implementation=implementation, **options)(x, ids, x.q)
    for implementation in ("pallas", "xla")
  )
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), kernels, xla)


@pytest.mark.slow
def test_it_compiles_to_a_kernel_for_a_tpu():
  pytest.importorskip("libtpu", reason="holds the TPUs' compiler; wheels for Linux on x86_64 only")
  from mc_jax.planning import topology

  rule = Fading(chunk=16)
  place = topology.one_chip("v5e:2x2")

  def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

  def loss(args):
    return memory.memory_caching(*args, rule=rule, segmentation=segments.constant(64)).sum()

  shape = 1, 256, 2, 128
  gates = {"alpha": array(*shape), "eta": array(*shape[:3])}
  args = *(array(*shape) for _ in range(4)), gates, {"w": array(2, 128, 128)}
  with jax.set_mesh(place.mesh):
    text = jax.jit(jax.grad(loss)).lower(args).compile().as_text()
  assert "fading_write_bwd" in text


@FLOAT64
@pytest.mark.parametrize("rule", [RULE, Frozen(chunk=samples.CHUNK)], ids=["free", "frozen"])
def test_it_decodes_to_the_numbers_of_the_whole_sequence(rule):
  x = samples.inputs(rule, batch=3)
  options = decode.Options(rule, segments.constant(samples.SEGMENT), capacity=5)
  expected = samples.jit(lambda x: memory.run(x.tokens(), x.init, memory.Options(rule, options.segmentation)))(x)
  prompt = samples.map_tokens(lambda a: a[:, :8], x)
  y, cache = samples.jit(lambda x: decode.prefill(options, x.tokens(), x.init))(prompt)
  step = samples.jit(lambda token, cache: decode.step(options, token.tokens(), x.init, cache))
  for t in range(8, 15):
    token, cache = step(samples.map_tokens(lambda a, t=t: a[:, t : t + 1], x), cache)
    y = jnp.concatenate([y, token], 1)
  np.testing.assert_allclose(y, expected[:, :15], rtol=1e-9, atol=1e-9)


@FLOAT64
@pytest.mark.parametrize("carry", ["checkpoint", slow("independent")])
def test_it_is_split_over_devices(carry):
  x = samples.inputs(RULE, length=4 * samples.SEGMENT)
  ids = np.repeat([[1, 2, 0, 3]] * 4, [5, 9, 2, 8], axis=1)
  options = memory.Options(RULE, segments.constant(samples.SEGMENT), carry=carry)
  expected = samples.jit(lambda x: memory.run(x.tokens(ids), x.init, options))(x)
  with jax.set_mesh(mesh.make(mesh.MeshConfig(data=1, context=4, model=2), jax.devices()[:8])):
    y = samples.jit(lambda tokens, init: context.run(tokens, init, options))(x.tokens(jnp.asarray(ids)), x.init)
  np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-9)


def test_a_model_trains_and_decodes_with_it():
  config = ModelConfig(
    vocab_size=16, layers=1, d_model=16, heads=2, memory=MemoryConfig(rule="fading", chunk=4, segment_length=4)
  )
  assert config.problems() == []
  model = LanguageModel(config, nnx.Rngs(jax.random.key(0, impl="rbg")))
  tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 16)
  graph, params = nnx.split(model)
  optimizer = optax.adam(1e-2)

  @samples.jit
  def train(params, state):
    def loss(params):
      logits = nnx.merge(graph, params)(tokens)
      return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, value, grads

  state, losses = optimizer.init(params), []
  for _ in range(10):
    params, state, loss, grads = train(params, state)
    losses.append(float(loss))
  assert losses[-1] < losses[0] - 0.2
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads.blocks.mixer.token_gates))

  @samples.jit
  def decoded(params):
    model, cache_config = nnx.merge(graph, params), CacheConfig(12)
    prompt, cache = model.prefill(tokens[:, :6], cache_config)
    following, _ = model.step(tokens[:, 6], cache, cache_config)
    return prompt, following, model(tokens)

  prompt, following, expected = decoded(params)
  np.testing.assert_allclose(prompt, expected[:, 5], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(following, expected[:, 6], rtol=1e-4, atol=1e-4)


def test_its_options_and_its_name_are_known_like_any_rules():
  assert rules.options("fading") == ("chunk",)
  assert rules.get("fading", chunk=4) == Fading(4)
  with pytest.raises(ValueError, match="there is a rule 'fading' already; names are linear, "):
    rules.register("fading", Fading)
