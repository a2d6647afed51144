"""The published layers around the memories: each as its publication has it, decoded, packed, on a mesh and learning."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marks import slow
from quick_compile import jit

from mc_jax import memory
from mc_jax.models import CacheConfig, LanguageModel, MemoryConfig, ModelConfig, forms, memory_sizes
from mc_jax.models.forms import Form
from mc_jax.models.layer import Context
from mc_jax.models.memory_caching import MemoryCaching
from mc_jax.models.published_gates import Activated, Decay, Horizons, Sizes
from mc_jax.parallel import axes
from mc_jax.parallel import mesh as meshes
from mc_jax.parallel.mesh import MeshConfig

LENGTH, PROMPT = 10, 5

# A rule, and what is turned besides: each takes seconds to compile.
LAYERS = [
  slow("retnet", {}),
  ("mamba2", {"value_heads": 4}),
  slow("gla", {"key_dim": 2}),
  slow("deltanet", {"max_step": 2.0}),
  slow("gated_deltanet", {"value_heads": 4}),
  slow("gated_deltanet", {"learned_init": True}),
  slow("kda", {"aggregation": "ssc"}),
  slow("gdn2", {}),
  slow("rwkv7", {}),
  slow("momentum_deltanet", {}),
  slow("titans", {"form": "mamba2", "expand_v": 1.0}),
  slow("mlstm", {"value_heads": 4, "key_heads": 1}),
  slow("mlstm", {"form": "mlstm_sigmoid"}),
]
EVERY_LAYER = pytest.mark.parametrize(("rule", "options"), LAYERS)


def tiny(rule, options, **model):
  options = {"chunk": 2, "segment_length": 4, "expansion": 2} | options
  sizes = {"vocab_size": 16, "layers": 1, "d_model": 16, "heads": 2, "mlp_dim": 16, "conv_width": 3, "max_length": 16}
  return ModelConfig(**(sizes | model), memory=MemoryConfig(rule=rule, **options))


def make(config, **changes):
  """The layer, without the model's check of dtype names: these tests run in float64."""
  assert config.problems() == []
  return MemoryCaching(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))


def tokens(config, batch=2, length=LENGTH):
  return jnp.asarray(np.random.default_rng(0).normal(size=(batch, length, config.d_model)))


@EVERY_LAYER
@pytest.mark.usefixtures("float64")
def test_a_layer_decodes_keeps_documents_apart_and_learns_everything(rule, options):
  config = tiny(rule, options)
  graph, params = nnx.split(make(config, dtype="float64"))
  x, cache_config = tokens(config), CacheConfig(LENGTH)
  x = x.at[1, :6].set(x[0, 4:])
  document = jnp.array([[1] * 4 + [2] * 6, [1] * 7 + [2] * 2 + [0]])

  def steps(params):
    layer, context = nnx.merge(graph, params), Context(cache=cache_config)
    prompt, cache = layer(x[:, :PROMPT], dataclasses.replace(context, lengths=jnp.array([PROMPT, 3])))

    def step(cache, token):
      y, cache = layer(token[:, None], context, cache)
      return cache, y[:, 0]

    rows = jnp.arange(2)[:, None]
    _, after = jax.lax.scan(step, cache, jnp.moveaxis(x[rows, jnp.array([[PROMPT], [3]]) + jnp.arange(5)], 1, 0))
    chex.assert_trees_all_equal_shapes_and_dtypes(layer.init_cache(cache_config, 2), cache)
    return prompt, jnp.moveaxis(after, 0, 1)

  def loss(params):
    layer = nnx.merge(graph, params)
    plain, packed = layer(x)[0], layer(x, Context(document))[0]
    return jnp.square(plain).sum(), (plain, packed)

  @jit
  def everything(params):
    gradients, (plain, packed) = jax.grad(loss, has_aux=True)(params)
    return gradients, plain, packed, steps(params)

  gradients, plain, packed, (prompt, after) = everything(params)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)  # norms and gates are float32
  close(prompt[0], plain[0, :PROMPT])
  close(prompt[1, :3], plain[1, :3])
  close(after[0], plain[0, PROMPT:])
  close(after[1], plain[1, 3:8])
  close(packed[0, 4:], plain[1, :6])
  close(packed[1, :7], plain[1, :7])
  for path, gradient in nnx.to_flat_state(gradients):
    assert np.isfinite(gradient[...]).all(), path
    assert np.abs(gradient[...]).max() > 0, path


# The published layers token by token, in NumPy: x [length, d_model], p the parameters of the layer by their names.


def silu(x):
  return x / (1 + np.exp(-x))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softplus(x):
  return np.log1p(np.exp(x))


def convolved(x, kernel, bias=0.0):
  """SiLU of a causal convolution of x [length, ...]."""
  padded = np.concatenate([np.zeros((len(kernel) - 1, *x.shape[1:])), x])
  return silu(sum(kernel[j] * padded[len(kernel) - 1 - j :][: len(x)] for j in range(len(kernel))) + bias)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rms(x, axis=-1):
  return x / np.sqrt(np.square(x).mean(axis, keepdims=True) + 1e-6)


def turned(x):
  """Rotary positions of x [length, heads, width]."""
  half = x.shape[-1] // 2
  angle = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
  z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
  return np.concatenate([z.real, z.imag], -1)


def matrices(q, k, v, alpha, eta, errors):
  """Answers of W_t = diag(alpha_t) W_{t-1} + eta_t k_t (x) (v_t - errors k_t diag(alpha_t) W_{t-1})."""
  y = np.zeros_like(v)
  for h in range(v.shape[1]):
    w = np.zeros((q.shape[-1], v.shape[-1]))
    for t in range(len(q)):
      w = alpha[t, h].reshape(-1, 1) * w
      w = w + eta[t, h] * np.outer(k[t, h], v[t, h] - errors * k[t, h] @ w)
      y[t, h] = q[t, h] @ w
  return y


def retnet(x, p):
  q, k = np.einsum("ld,dphk->plhk", x, p["projection/kernel"])
  v, g = np.einsum("ld,dphk->plhk", x, p["value_projection/kernel"])
  q, k = turned(q), turned(k) * k.shape[-1] ** -0.5
  alpha = np.tile(1 - 2.0 ** (-5 - np.arange(2)), (len(x), 1))
  y = rms(matrices(q, k, v, alpha, np.ones_like(alpha), 0)) * p["norm/scale"] * silu(g)
  return np.einsum("lhk,hkd->ld", y, p["output/kernel"])


def mamba2(x, p):
  c, b = np.einsum("ld,dphk->plhk", x, p["projection/kernel"])
  v, z = np.einsum("ld,dphk->plhk", x, p["value_projection/kernel"])
  q, k, v = (
    convolved(x, p[f"{name}_convolution/kernel"], p[f"{name}_convolution/bias"])
    for name, x in (("query", c), ("key", b), ("value", v))
  )
  dt = softplus(x @ p["token_gates/alpha/linear/kernel"] + p["token_gates/alpha/dt_bias"])
  alpha = np.exp(-np.exp(p["token_gates/alpha/log_rate"]) * dt)
  q, k = np.repeat(q, 4, 1), np.repeat(k, 4, 1)
  y = matrices(q, k, v, alpha, dt, 0) + p["skip"][:, None] * v
  y = rms(y * silu(z), (-1, -2)) * p["norm/scale"]
  return np.einsum("lhk,hkd->ld", y, p["output/kernel"])


def gated_deltanet(x, p):
  q, k = np.einsum("ld,dphk->plhk", x, p["projection/kernel"])
  v, g = np.einsum("ld,dphk->plhk", x, p["value_projection/kernel"])
  q, k, v = (convolved(x, p[f"{n}_convolution/kernel"]) for n, x in (("query", q), ("key", k), ("value", v)))
  q, k = (np.repeat(unit(x), 2, 1) for x in (q, k))
  dt = softplus(x @ p["token_gates/alpha/linear/kernel"] + p["token_gates/alpha/dt_bias"])
  alpha = np.exp(-np.exp(p["token_gates/alpha/log_rate"]) * dt)
  eta = sigmoid(x @ p["token_gates/eta/linear/kernel"])
  y = rms(matrices(q * q.shape[-1] ** -0.5, k, v, alpha, eta, 1)) * p["norm/scale"] * silu(g)
  return np.einsum("lhk,hkd->ld", y, p["output/kernel"])


def kda(x, p):
  q, k, v = np.einsum("ld,dphk->plhk", x, p["projection/kernel"])
  q, k, v = (convolved(x, p[f"{n}_convolution/kernel"]) for n, x in (("query", q), ("key", k), ("value", v)))
  f = x @ p["token_gates/channel_alpha/linear/down/kernel"]
  f = np.einsum("lr,rhk->lhk", f, p["token_gates/channel_alpha/linear/up/kernel"])
  dt = softplus(f + p["token_gates/channel_alpha/dt_bias"])
  alpha = np.exp(np.maximum(-np.exp(p["token_gates/channel_alpha/log_rate"])[:, None] * dt, -11))  # the rule's bound
  eta = sigmoid(x @ p["token_gates/eta/linear/kernel"])
  g = np.einsum("lr,rhk->lhk", x @ p["output_gate/down/kernel"], p["output_gate/up/kernel"]) + p["output_gate/bias"]
  y = matrices(unit(q) * q.shape[-1] ** -0.5, unit(k), v, alpha, eta, 1)
  return np.einsum("lhk,hkd->ld", rms(y) * p["norm/scale"] * sigmoid(g), p["output/kernel"])


def mlstm(x, p):
  q, k = np.einsum("ld,dphk->plhk", x, p["projection/kernel"])
  v, g = np.einsum("ld,dphk->plhk", x, p["value_projection/kernel"])
  gates = {}
  for name in ("alpha", "eta"):
    logits = x @ p[f"token_gates/{name}/linear/kernel"] + p[f"token_gates/{name}/bias"]
    gates[name] = 15 * np.tanh(logits / 15)
  alpha, eta, q = sigmoid(gates["alpha"]), np.exp(gates["eta"]), q * q.shape[-1] ** -0.5
  normaliser = matrices(q, k, np.ones_like(v), alpha, eta, 0)
  y = matrices(q, k, v, alpha, eta, 0) / np.maximum(np.abs(normaliser), 1)
  y = rms(y - y.mean(-1, keepdims=True)) * p["norm/scale"] * sigmoid(g)
  return np.einsum("lhk,hkd->ld", y, p["output/kernel"])


@pytest.mark.parametrize(
  ("published", "options"),
  [
    slow(retnet, {}),
    slow(mamba2, {"value_heads": 4}),
    (gated_deltanet, {"value_heads": 4}),
    slow(kda, {}),
    (mlstm, {}),
  ],
  ids=lambda x: x.__name__ if callable(x) else "",
)
@pytest.mark.usefixtures("float64")
def test_a_layer_is_the_published_one(published, options):
  """Without caches; every parameter takes part, moved away from where it starts."""
  config = tiny(published.__name__, {"aggregation": "none"} | options)
  layer = make(config, dtype="float64")
  graph, params = nnx.split(layer)
  random = np.random.default_rng(1)
  params = jax.tree.map(lambda w: w + 0.3 * random.normal(size=w.shape), params)
  named = {"/".join(map(str, path)): np.asarray(w[...]) for path, w in nnx.to_flat_state(params)}
  x = tokens(config, batch=1)
  y = jit(lambda params: nnx.merge(graph, params)(x)[0])(params)
  np.testing.assert_allclose(y[0], published(np.asarray(x[0]), named), rtol=1e-4, atol=1e-4)


def gate_sizes(per_channel=False, heads=64, maximum=1.0):
  return Sizes(d_model=16, heads=heads, head_dim=32, per_channel=per_channel, maximum=maximum)


@pytest.mark.parametrize("per_channel", [False, True])
def test_decays_start_as_mambas_do(per_channel):
  """A uniform between its rates, dt log-uniform between 0.001 and 0.1: dt_bias is the inverse of softplus."""
  gate = Decay(step="eta", rates=(1.0, 16.0)).build(gate_sizes(per_channel, heads=4096), rngs=nnx.Rngs(0))
  rates, dt = np.exp(gate.log_rate[...]), np.log(jax.nn.softplus(gate.dt_bias[...]))
  assert 1 <= rates.min() < 1.02 and 15.98 < rates.max() <= 16.001
  assert rates.mean() == pytest.approx(8.5, rel=0.05)
  low, high = math.log(0.001), math.log(0.1)
  assert low - 1e-3 <= dt.min() < low + 0.02 and high - 0.02 < dt.max() <= high + 1e-3
  assert dt.mean() == pytest.approx((low + high) / 2, rel=0.05)
  chex.assert_shape(gate.dt_bias[...], (4096, 32) if per_channel else (4096,))
  values = gate(jnp.zeros((1, 2, 16)))
  np.testing.assert_allclose(values["eta"][0, 0], np.exp(dt), rtol=1e-5)
  np.testing.assert_allclose(np.log(values["alpha"][0, 1]).T, -rates * np.exp(dt).T, rtol=1e-3, atol=1e-6)


def test_a_rate_near_zero_has_a_logarithm():
  gate = Decay(rates=(0.0, 16.0)).build(gate_sizes(heads=4096), rngs=nnx.Rngs(0))
  assert np.isfinite(gate.log_rate[...]).all() and np.exp(gate.log_rate[...]).min() < 0.05


@pytest.mark.parametrize(
  ("how", "start"),
  [
    (Horizons(), 1 - 2.0 ** (-5 - np.arange(4))),
    (Activated("eta"), np.full(4, 0.5)),
    (Activated("eta", bias=(-10.0, -10.0), cap=15.0), np.full(4, sigmoid(15 * math.tanh(-10 / 15)))),
    (Activated("eta", "exp", bias=(-10.0, -10.0), cap=15.0), np.full(4, math.exp(15 * math.tanh(-10 / 15)))),
    (Activated("alpha", bias=(3.0, 6.0), cap=15.0), sigmoid(15 * np.tanh(np.linspace(3, 6, 4) / 15))),
    (Activated("alpha", power=1 / 16, bias=(0.0, 0.0), rank=16), np.full(4, 0.5 ** (1 / 16))),
  ],
  ids=str,
)
def test_other_gates_start_as_published(how, start):
  (value,) = how.build(gate_sizes(heads=4), rngs=nnx.Rngs(0))(jnp.zeros((1, 2, 16))).values()
  np.testing.assert_allclose(value[0, 1], start, rtol=1e-5)
  (value,) = how.build(gate_sizes(heads=4, per_channel=True), rngs=nnx.Rngs(0))(jnp.zeros((1, 2, 16))).values()
  np.testing.assert_allclose(value[0, 1], np.broadcast_to(start[:, None], (4, 32)), rtol=1e-5)


def test_the_largest_step_is_the_rules():
  """Of the delta rule 2 is for negative eigenvalues."""
  (value,) = Activated("eta").build(gate_sizes(maximum=2.0), rngs=nnx.Rngs(0))(jnp.zeros((1, 1, 16))).values()
  np.testing.assert_allclose(value, 1.0)


@pytest.mark.parametrize(
  ("rule", "options", "sizes"),
  [
    slow("mamba2", {"value_heads": 4}, {"fsdp": 2, "model": 2}),
    *(
      slow(rule, options, {"data": 2, "context": 2, "model": 2})
      for rule, options in (("mamba2", {}), ("retnet", {}), ("gated_deltanet", {"value_heads": 4}), ("kda", {}))
    ),
  ],
)
def test_a_mesh_computes_what_one_device_does(rule, options, sizes):
  config = tiny(rule, options)
  graph, params = nnx.split(make(config))
  x = tokens(config, length=16).astype(jnp.float32)
  documents = jnp.repeat(jnp.array([[1, 2], [1, 0]]), jnp.array([5, 11]), axis=1, total_repeat_length=16)

  def forward(params):
    return nnx.merge(graph, params)(x, Context(documents))[0]

  expected = jit(forward)(params)

  def placed(w):
    return w.replace(jax.device_put(w[...], axes.sharding(mesh, w.get_metadata("out_sharding"), w.shape)))

  mesh = meshes.make(MeshConfig(**({"data": 1} | sizes)), jax.devices()[: math.prod(sizes.values())])
  params = nnx.from_flat_state({path: placed(w) for path, w in nnx.to_flat_state(params)})
  with jax.set_mesh(mesh):
    found = jit(forward)(params)
  np.testing.assert_allclose(found[documents > 0], expected[documents > 0], rtol=1e-4, atol=1e-5)


def test_memories_are_counted_where_there_are_more_of_them_than_heads():
  config = tiny("gated_deltanet", {"value_heads": 4})
  assert memory_sizes.sizes(config) == (2, 4, 8, 16)
  assert MemoryCaching.cache_bytes(config, 12) == {
    "checkpoint": 4 * 8 * 16 * 4,
    "sequence": 3 * 4 * 8 * 16 * 4,
    "summaries": 3 * 4 * 8 * 4,
  }
  assert MemoryCaching.segment_bytes(config, 12) == 3 * 4 * 8 * 16 * 4
  work = MemoryCaching.work(config, 12, 1)
  assert work.parameters == 16 * (3 * 2 * 8 + 3 * 4 * 16)
  assert work.flops == (4 * 1.5 + 16) * 2 * 4 * 8 * 16
  ones = {"data": 1, "fsdp": 1, "context": 1, "model": 1}
  assert MemoryCaching.mesh_problems(config, 12, ones | {"model": 4}) == []
  (problem,) = MemoryCaching.mesh_problems(config, 12, ones | {"model": 8})
  assert "model.memory.value_heads=4 is not divisible by mesh.model=8" in problem


@pytest.mark.parametrize(
  ("rule", "options", "expected"),
  [
    ("titans", {"form": "mine"}, "model.memory.form='mine' is not one of None, memory_caching, retnet, mamba2"),
    (
      "deltanet",
      {"value_heads": 3},
      "model.memory.value_heads=3 must be a multiple of the heads of queries and keys, 2",
    ),
    ("deltanet", {"key_heads": 3}, "model.heads=2 must be a multiple of the heads of queries and keys, 3"),
    ("deltanet", {"expand_v": 0.3}, "model.memory.expand_v=0.3 makes values 2.4 wide, for keys are 8"),
    ("deltanet", {"expand_v": -1.0}, "model.memory.expand_v=-1.0 must be a positive number"),
    ("deltanet", {"key_dim": 0}, "model.memory.key_dim=0 must be at least 1"),
    ("titans", {"expand_v": 2.0}, "model.memory.expand_v=2.0 does not go together with model.memory.rule='titans': "),
    ("titans", {"form": "retnet"}, "model.memory.expand_v=2.0 does not go together with model.memory.rule='titans': "),
    ("retnet", {"key_dim": 3}, "model.memory.key_dim=3 makes keys 3 wide, which is odd"),
    ("mamba2", {"max_step": 0.5}, "model.memory.max_step=0.5 has no effect"),
  ],
  ids=str,
)
def test_what_does_not_fit_is_named(rule, options, expected):
  problems = tiny(rule, options).problems()
  assert len(problems) == 1 and expected in problems[0], problems


@pytest.mark.parametrize("form", forms.FORMS)
def test_every_form_computes_in_the_models_dtype_with_gates_in_float32(form):
  rule = form if form in memory.RULES else "gated_deltanet"
  config = tiny(rule, {"form": form, "value_heads": 4}, dtype="bfloat16")
  x = jax.ShapeDtypeStruct((2, LENGTH, 16), jnp.bfloat16)

  def forward(x):
    layer = make(config)
    return layer(x)[0], layer.project(x).tokens

  y, given = jax.eval_shape(forward, x)
  assert y.shape == x.shape and y.dtype == x.dtype
  assert {given.q.dtype, given.k.dtype, given.v.dtype, given.u.dtype} == {x.dtype}
  assert all(gate.dtype == jnp.float32 for gate in given.gates.values())


def test_a_rule_without_a_form_has_the_default_and_any_form_can_be_named():
  assert forms.of(MemoryConfig(rule="titans")) == forms.of(MemoryConfig(rule="momentum_deltanet")) == Form()
  assert forms.of(MemoryConfig(rule="kda", form="memory_caching")) == Form()
  assert forms.of(MemoryConfig(rule="kda")) == forms.of(MemoryConfig(rule="titans", form="kda")) != Form()


def test_a_form_of_ones_own_is_an_entry():
  forms.register("mine", Form(output_gate=None, convolution=False))
  try:
    layer = make(tiny("linear", {"form": "mine", "aggregation": "none"}))
    assert layer.projected == (("projection", ("query", "key", "value")),)
    assert not hasattr(layer, "query_convolution")
    with pytest.raises(ValueError, match="there is a form 'mine' already; names are memory_caching, retnet"):
      forms.register("mine", Form())
  finally:
    del forms.FORMS["mine"]


def test_weight_decay_is_for_projections():
  from mc_jax.training.optimizer import decayed

  config = tiny("kda", {})
  params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(LanguageModel(config, nnx.Rngs(0)))))["blocks"]["mixer"]
  names = {
    "/".join(str(key.key) for key in path) for path, yes in jax.tree_util.tree_leaves_with_path(decayed(params)) if yes
  }
  assert names == {"projection/kernel", "output_gate/down/kernel", "output_gate/up/kernel", "output/kernel"}
