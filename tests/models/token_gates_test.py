"""Per-token gates begin where the rule wants them, and stay in their range."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mc_jax import memory
from mc_jax.models.token_gates import TokenGates


@pytest.mark.parametrize("name", ["swla", "dla", "titans"])
def test_gates_start_near_the_rules_values_for_every_token(name):
  rule = memory.rules.get(name)
  starts = rule.gate_init(256)
  gates = TokenGates(rule, 256, d_model=64, heads=2, head_dim=8, rngs=nnx.Rngs(0))
  values = gates(jax.random.normal(jax.random.key(0), (4, 50, 64)))
  assert tuple(values) == tuple(rule.gates)
  for gate, start in starts.items():
    chex.assert_shape(values[gate], (4, 50, 2))
    logits = jax.scipy.special.logit(values[gate] / start.maximum)
    assert jnp.abs(logits.mean() - start.bias) < 0.05, gate
    assert 0.02 < logits.std() < 0.3, gate  # tokens differ, but little


def test_gates_stay_between_zero_and_their_maximum_in_float32():
  rule = memory.rules.get("titans", max_step=0.5)
  starts = rule.gate_init(256)
  gates = TokenGates(rule, 256, d_model=64, heads=2, head_dim=8, rngs=nnx.Rngs(0))
  x = 1e3 * jax.random.normal(jax.random.key(0), (4, 50, 64), jnp.bfloat16)
  values = gates(x)
  chex.assert_type(list(values.values()), jnp.float32)
  for gate, start in starts.items():
    assert values[gate].min() >= 0
    assert values[gate].max() <= start.maximum, gate
  assert values["eta"].max() > 0.49
