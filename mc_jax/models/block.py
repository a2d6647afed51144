"""A residual block: a mixer across tokens, a feed-forward network within each."""

from typing import Any

import jax
from flax import nnx

from mc_jax.models.cache import LayerCache
from mc_jax.models.config import ModelConfig
from mc_jax.models.layer import PLAIN, Context
from mc_jax.models.norms import RMSNorm
from mc_jax.parallel import axes


class Block(nnx.Module):
  """x + mixer(norm(x)), then x + mlp(norm(x)).

  Args:
    config: The model's.
    place: Of the block in the model's period, which says what its layers are.
    rngs: Initialises the parameters.
  """

  def __init__(self, config: ModelConfig, place: int = 0, *, rngs: nnx.Rngs):
    self.mixer_norm = RMSNorm({"embed": config.d_model}, rngs=rngs)
    self.mixer = config.mixers[place](config, rngs=rngs)
    self.mlp_norm = RMSNorm({"embed": config.d_model}, rngs=rngs)
    self.mlp = config.feed_forwards[place](config, rngs=rngs)

  def __call__(self, x: jax.Array, context: Context = PLAIN, cache: LayerCache | None = None) -> tuple[jax.Array, Any]:
    """x [batch, length, d_model] to the same shape and dtype, and what is left; see `layer.Mixer`."""
    y, left = self.mixer(self.mixer_norm(x), context, cache)
    x = axes.constrain(x + y, axes.RESIDUAL)
    y = self.mlp_norm(x)
    if context.count:
      left = self.mlp.count(y, context)
    return axes.constrain(x + self.mlp(y, context), axes.RESIDUAL), left
