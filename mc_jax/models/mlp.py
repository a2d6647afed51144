"""The gated feed-forward network of a block."""

import jax
from flax import nnx

from mc_jax.models.config import ModelConfig
from mc_jax.models.linear import Linear, residual_scale
from mc_jax.parallel import axes


class SwiGLU(nnx.Module):
  """(SiLU(x W_gate) * x W_up) W_down, token by token (arXiv:2002.05202)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    embed, hidden = {"embed": config.d_model}, {"mlp": config.hidden_dim}
    self.gate = Linear(embed, hidden, dtype=config.dtype, rngs=rngs)
    self.up = Linear(embed, hidden, dtype=config.dtype, rngs=rngs)
    self.down = Linear(hidden, embed, dtype=config.dtype, scale=residual_scale(config.layers), rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """x [batch, length, d_model] to the same shape, in the computation's dtype."""
    hidden = jax.nn.silu(self.gate(x)) * self.up(x)
    return self.down(axes.constrain(hidden, (*axes.TOKENS, "mlp")))
