"""The recurrences against the implementations of others, outputs and gradients; without them these tests are skipped.

    pip install torch einops transformers fla-core mlstm_kernels
    python -m pytest -n 0 -s tests/parity

fla's are the plain PyTorch functions that its kernels are tested with: files that need neither Triton nor a GPU.
docs/parity.md has the results, with the versions.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mc_jax import memory
from mc_jax.memory import rules, segments

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="the oracles are PyTorch's: pip install torch einops transformers fla-core")

BATCH, LENGTH, HEADS, KEYS, VALUES, CHUNK = 2, 64, 3, 8, 16, 16


def naive(folder: str):
  """fla/ops/FOLDER/naive.py, whose package cannot be imported where there is no Triton."""
  package = importlib.util.find_spec("fla")
  if package is None:
    pytest.skip("needs fla-core: pip install fla-core einops")
  path = pathlib.Path(next(iter(package.submodule_search_locations))) / "ops" / folder / "naive.py"
  spec = importlib.util.spec_from_file_location(f"fla_{folder.replace('/', '_')}_naive", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def heads_first(x):
  return x.transpose(1, 2)


def retention(q, k, v, alpha):
  del alpha  # is in it
  return heads_first(naive("retention").naive_retention(*map(heads_first, (q, k, v))))


def simple_gla(q, k, v, alpha):
  return naive("simple_gla").naive_recurrent_simple_gla(q, k, v, alpha.log())[0]


def mamba2(q, k, v, alpha, eta):
  return naive("simple_gla").naive_recurrent_simple_gla(q, k, eta[..., None] * v, alpha.log())[0]


def gla(q, k, v, alpha):
  return naive("gla").naive_recurrent_gla(q, k, v, alpha.log())[0]


def delta_rule(q, k, v, eta):
  q, k, v, eta = (heads_first(x) for x in (q, k, v, eta[..., None]))
  return heads_first(naive("delta_rule").delta_rule_recurrence(q, k, v, eta)[0])


def gated_delta_rule(q, k, v, alpha, eta):
  return naive("gated_delta_rule").naive_recurrent_gated_delta_rule(q, k, v, eta, alpha.log())[0]


def qwen3_next(q, k, v, alpha, eta):
  path = "transformers.models.qwen3_next.modeling_qwen3_next"
  model = pytest.importorskip(path, reason="pip install transformers")
  return model.torch_chunk_gated_delta_rule(q, k, v, alpha.log(), eta, chunk_size=CHUNK)[0]


def kda(q, k, v, alpha, eta):
  return naive("kda").naive_recurrent_kda(q, k, v, alpha.log(), eta)[0]


def gdn2(q, k, v, alpha, eta):
  return naive("gdn2").naive_recurrent_gdn2(q, k, v, alpha.log(), eta, torch.ones_like(v))[0]


def dplr(q, k, v, alpha, eta, write):
  inputs = q, write * k, v, k, -eta * k, alpha.log()
  return heads_first(naive("generalized_delta_rule/dplr").dplr_recurrence(*map(heads_first, inputs))[0])


def momentum_delta_rule(q, k, v, alpha, beta, eta):
  run = naive("momentum_delta_rule").recurrent_momentum_delta_rule_ref
  return run(q, k, v, alpha.log(), beta.log(), k, torch.ones_like(eta), 2 * eta)[0]


ORACLES = [
  ("retnet", retention),
  ("retnet", simple_gla),
  ("mamba2", mamba2),
  ("gla", gla),
  ("deltanet", delta_rule),
  ("gated_deltanet", gated_delta_rule),
  ("gated_deltanet", qwen3_next),
  ("kda", kda),
  ("gdn2", gdn2),
  ("rwkv7", dplr),
  ("momentum_deltanet", momentum_delta_rule),
]


def inputs(rule):
  """q, k, v and gates, float32: unit keys, decays down to e^-1, steps up to 1."""
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, BATCH, LENGTH, HEADS, KEYS))
  v = rng.normal(size=(BATCH, LENGTH, HEADS, VALUES))
  gates = {}
  for name, gate in rule.gates.items():
    shape = (BATCH, LENGTH, HEADS, KEYS) if gate.per_channel else (BATCH, LENGTH, HEADS)
    gates[name] = np.exp(-rng.uniform(0, 1, shape)) if name in ("alpha", "beta") else rng.uniform(0.1, 1, shape)
  return jax.tree.map(np.float32, ((q, k / np.linalg.norm(k, axis=-1, keepdims=True), v), gates))


def ours(rule, qkv, gates, cotangent):
  """Answers, and their gradients along the cotangent."""

  def run(qkv, gates):
    init = rule.init(jax.random.key(0), heads=HEADS, head_dim=KEYS, value_dim=VALUES)
    q = qkv[0] * KEYS**-0.5  # as all of them have it
    options = dict(rule=rule, aggregation="none", segmentation=segments.constant(32))
    return memory.memory_caching(q, *qkv[1:], q, gates, init, **options)

  y, pull = jax.vjp(run, qkv, gates)
  return jax.device_get((y, pull(jnp.asarray(cotangent))))


def largest(a, b):
  """The largest difference, of the largest number of b."""
  return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize(("name", "oracle"), ORACLES, ids=[f"{name}-{oracle.__name__}" for name, oracle in ORACLES])
def test_answers_and_gradients_are_those_of_others(name, oracle):
  rule = rules.get(name, chunk=CHUNK)
  qkv, gates = inputs(rule)
  if oracle is retention:
    gates["alpha"] = np.broadcast_to(1 - 2.0 ** (-5 - np.arange(HEADS, dtype=np.float32)), gates["alpha"].shape)
  tensors = [torch.tensor(np.array(x), requires_grad=True) for x in (*qkv, *gates.values())]
  expected = oracle(*tensors)
  cotangent = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
  expected.backward(torch.tensor(cotangent))
  y, (d_qkv, d_gates) = ours(rule, qkv, gates, cotangent)
  figures = {"y": largest(y, expected.detach().numpy())}
  for what, got, tensor in zip(("q", "k", "v", *gates), (*d_qkv, *d_gates.values()), tensors, strict=True):
    if tensor.grad is not None:
      figures[what] = largest(got, tensor.grad.numpy())
  print(f"| `{name}` | `{oracle.__name__}` | {figures.pop('y'):.1e} | {max(figures.values()):.1e} |")
  assert largest(y, expected.detach().numpy()) < 1e-5
  assert max(figures.values()) < 1e-5


def test_mlstm_is_that_of_its_authors():
  """In float64, which JAX has on both sides; eps is added to the normaliser in their code, and is not in the paper."""
  kernels = pytest.importorskip("mlstm_kernels.jax.parallel.native_stablef.fw", reason="pip install mlstm_kernels")
  rule = rules.get("mlstm", chunk=CHUNK)

  def theirs(q, k, v, forget, let_in):
    first = (jnp.swapaxes(x, 1, 2) for x in (q, k, v, let_in, forget))
    return jnp.swapaxes(kernels.mlstm_parallel_fw(*first, eps=0.0)[0], 1, 2)

  def ours(q, k, v, forget, let_in):
    gates = {"alpha": jax.nn.sigmoid(forget), "eta": jnp.exp(let_in)}
    init = rule.init(jax.random.key(0), heads=HEADS, head_dim=KEYS, value_dim=VALUES)
    q = q * KEYS**-0.5
    options = dict(rule=rule, aggregation="none", segmentation=segments.constant(32))
    return memory.memory_caching(q, k, v, q, gates, init, **options)

  rng = np.random.default_rng(2)
  forget, let_in = rng.normal(size=(2, BATCH, LENGTH, HEADS))
  with jax.enable_x64(True):
    args = *jax.tree.map(np.float64, inputs(rule)[0]), forget + 3, 3 * let_in
    (y, pull), (expected, other) = (jax.vjp(run, *args) for run in (ours, theirs))
    cotangent = rng.normal(size=y.shape)
    figures = [largest(a, b) for a, b in zip(pull(cotangent), other(cotangent), strict=True)]
  print(f"| `mlstm` | `mlstm_parallel_fw` | {largest(y, expected):.1e} | {max(figures):.1e} |")
  assert largest(y, expected) < 1e-9
  assert max(figures) < 1e-9
