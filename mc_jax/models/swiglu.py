"""The gated feed-forward network of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from flax import nnx

from mc_jax.models import layer, problems
from mc_jax.models.layer import PLAIN, Context, Work
from mc_jax.models.linear import Linear, residual_scale
from mc_jax.parallel import axes

if TYPE_CHECKING:
  from mc_jax.models.config import ModelConfig


@layer.register("swiglu")
class SwiGLU(layer.FeedForward):
  """(SiLU(x W_gate) * x W_up) W_down, token by token (arXiv:2002.05202)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    embed, hidden = {"embed": config.d_model}, {"mlp": config.hidden_dim}
    self.gate = Linear(embed, hidden, dtype=config.dtype, rngs=rngs)
    self.up = Linear(embed, hidden, dtype=config.dtype, rngs=rngs)
    self.down = Linear(hidden, embed, dtype=config.dtype, scale=residual_scale(config.layers), rngs=rngs)

  def __call__(self, x: jax.Array, context: Context = PLAIN) -> jax.Array:
    """x [batch, length, d_model] to the same shape, in the computation's dtype."""
    hidden = jax.nn.silu(self.gate(x)) * self.up(x)
    return self.down(axes.constrain(hidden, (*axes.TOKENS, "mlp")))

  @classmethod
  def mesh_problems(cls, config: ModelConfig, length: int, sizes: dict[str, int]) -> list[str]:
    """The hidden width is split."""
    width = f"model.mlp_dim={config.mlp_dim}" + ("" if config.mlp_dim else f" (a width of {config.hidden_dim})")
    return problems.indivisible(config.hidden_dim, width, sizes, "model")

  @classmethod
  def work(cls, config: ModelConfig, length: int, context: int) -> Work:
    """Three projections."""
    return Work(parameters=3 * config.d_model * config.hidden_dim)
