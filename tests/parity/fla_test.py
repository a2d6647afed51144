"""Rules against flash-linear-attention's token-by-token functions: pip install fla-core einops torch."""

import importlib.util
import pathlib

import oracles
import pytest

from mc_jax.memory import rules

torch = pytest.importorskip("torch", reason="pip install fla-core einops torch")
pytest.importorskip("einops", reason="pip install fla-core einops torch")
if (FLA := importlib.util.find_spec("fla")) is None:
  pytest.skip("pip install fla-core einops torch", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64")]

FLOAT32 = 1e-5  # they compute in float32, whatever they are given


def naive(operation, function):
  """A function of fla/ops/OPERATION/naive.py, loaded by its path: `import fla` needs triton, these files do not."""
  path = pathlib.Path(FLA.submodule_search_locations[0], "ops", operation, "naive.py")
  spec = importlib.util.spec_from_file_location(f"fla_{operation.replace('/', '_')}_naive", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return getattr(module, function)


def heads_first(*tensors):
  return (x.transpose(1, 2) for x in tensors)


def unscaled(q):
  """Queries for functions that multiply them by key_dim^-0.5 and take no other scale."""
  return q * q.shape[-1] ** 0.5


def retention(x):
  return naive("retention", "naive_retention")(*heads_first(unscaled(x["q"]), x["k"], x["v"])).transpose(1, 2)


def simple_gla(x):
  run, gates = naive("simple_gla", "naive_recurrent_simple_gla"), x["gates"]
  v = gates["eta"][..., None] * x["v"]
  return run(x["q"], x["k"], v, gates["alpha"].log(), scale=1.0, initial_state=x["init"]["w"])[0]


def gla(x):
  run = naive("gla", "naive_recurrent_gla")
  return run(unscaled(x["q"]), x["k"], x["v"], x["gates"]["alpha"].log(), initial_state=x["init"]["w"])[0]


def delta_rule(x):
  run = naive("delta_rule", "delta_rule_recurrence")
  tokens = heads_first(unscaled(x["q"]), x["k"], x["v"], x["gates"]["eta"])
  return run(*tokens, initial_state=x["init"]["w"])[0].transpose(1, 2)


def gated_delta_rule(x):
  run, gates = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule"), x["gates"]
  options = dict(beta=gates["eta"], g=gates["alpha"].log(), scale=1.0, initial_state=x["init"]["w"])
  return run(x["q"], x["k"], x["v"], **options)[0]


def kda(x):
  run, gates = naive("kda", "naive_recurrent_kda"), x["gates"]
  options = dict(beta=gates["eta"], g=gates["alpha"].log(), scale=1.0, initial_state=x["init"]["w"])
  return run(x["q"], x["k"], x["v"], **options)[0]


def gdn2(x):
  """Their write gate multiplies values, and so is no part of our rule."""
  run, gates = naive("gdn2", "naive_recurrent_gdn2"), x["gates"]
  w = torch.linspace(0.2, 0.8, x["v"].numel()).reshape(x["v"].shape)
  options = dict(g=gates["alpha"].log(), b=gates["eta"], w=w, scale=1.0, initial_state=x["init"]["w"])
  return run(x["q"], x["k"], x["v"] / w, **options)[0]


def dplr(x):
  """What fla's RWKV-7 calls: S_t = exp(g) o S_{t-1} + b (x) (a S_{t-1}) + k (x) v."""
  run, gates, k = naive("generalized_delta_rule/dplr", "dplr_recurrence"), x["gates"], x["k"]
  written, look, erased = gates["write"] * k, -k, gates["eta"] * k
  tokens = heads_first(unscaled(x["q"]), written, x["v"], look, erased, gates["alpha"].log())
  return run(*tokens, initial_state=x["init"]["w"])[0].transpose(1, 2)


def momentum_delta_rule(x):
  """Their step is along the gradient of half the squared error."""
  run, gates = naive("momentum_delta_rule", "recurrent_momentum_delta_rule_ref"), x["gates"]
  rates = dict(log_alpha=gates["alpha"].log(), log_mu=gates["beta"].log(), eta=2 * gates["eta"])
  rates["beta"] = torch.ones_like(gates["beta"])
  return run(x["q"], x["k"], x["v"], p=x["k"], scale=1.0, initial_S=x["init"]["w"], **rates)[0]


ORACLES = {
  "mamba2": simple_gla,
  "gla": gla,
  "deltanet": delta_rule,
  "gated_deltanet": gated_delta_rule,
  "kda": kda,
  "gdn2": gdn2,
  "rwkv7": dplr,
  "momentum_deltanet": momentum_delta_rule,
}


@pytest.mark.parametrize("name", ORACLES)
def test_a_rule_is_flash_linear_attentions(name):
  rule = rules.get(name, chunk=oracles.CHUNK)
  oracles.assert_equal(rule, ORACLES[name], oracles.inputs(rule), rtol=FLOAT32)


def test_retention_with_its_constant_decays_is_flash_linear_attentions():
  rule = rules.get("retnet", chunk=oracles.CHUNK)
  x = oracles.inputs(rule, heads=4, fresh=True)
  x["gates"]["alpha"][:] = [1 - 2.0 ** (-5 - head) for head in range(4)]
  oracles.assert_equal(rule, retention, x, rtol=FLOAT32, unread=("alpha", "w"))
