"""Rules against the PyTorch functions of Hugging Face's models: pip install transformers torch.

`inspect.unwrap`: where fla or mamba-ssm are installed, transformers calls their kernels instead.
"""

import inspect

import oracles
import pytest

from mc_jax.memory import rules

pytest.importorskip("transformers", reason="pip install transformers torch")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64")]

FLOAT32 = 1e-5  # they compute in float32, whatever they are given


def function(model, name):
  """A function of transformers.models.MODEL."""
  module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}", reason="pip install -U transformers")
  return inspect.unwrap(getattr(module, name))


def delta_rule(model, name, **options):
  """The functions that are called as Qwen3-Next's; all scale queries by key_dim^-0.5."""

  def oracle(x):
    q, gates, state = x["q"] * x["q"].shape[-1] ** 0.5, x["gates"], x["init"]["w"]
    rates = dict(g=gates["alpha"].log(), beta=gates["eta"])
    run = function(model, name)
    return run(q, x["k"], x["v"], **rates, initial_state=state, output_final_state=False, **options)[0]

  return oracle


def mamba2(x):
  """Their decay is exp(A dt), where A may be of each token, too; their states are ours transposed."""
  dt, alpha, state = x["gates"]["eta"], x["gates"]["alpha"], x["init"]["w"].transpose(-1, -2)
  run = function("mamba2", "mamba2_chunk_scan")
  return run(x["v"], dt, alpha.log() / dt, x["k"], x["q"], chunk_size=10, initial_states=state)


ORACLES = {
  "qwen3_next-recurrent": ("gated_deltanet", delta_rule("qwen3_next", "torch_recurrent_gated_delta_rule")),
  "qwen3_next-chunk": ("gated_deltanet", delta_rule("qwen3_next", "torch_chunk_gated_delta_rule", chunk_size=10)),
  "kimi_linear-recurrent": ("kda", delta_rule("kimi_linear", "recurrent_kimi_delta_attention")),
  "kimi_linear-chunk": ("kda", delta_rule("kimi_linear", "chunk_kimi_delta_attention", chunk_size=10)),
  "mamba2-chunk": ("mamba2", mamba2),
}


@pytest.mark.parametrize("oracle", ORACLES)
def test_a_rule_is_that_of_a_model_of_transformers(oracle):
  name, run = ORACLES[oracle]
  rule = rules.get(name, chunk=oracles.CHUNK)
  oracles.assert_equal(rule, run, oracles.inputs(rule), rtol=FLOAT32)
