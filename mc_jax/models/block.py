"""A residual block: a mixer across tokens, a SwiGLU within each."""

import jax
from flax import nnx

from mc_jax.models.attention import Attention
from mc_jax.models.config import ModelConfig
from mc_jax.models.mixer import MemoryCaching
from mc_jax.models.mlp import SwiGLU
from mc_jax.models.norms import RMSNorm
from mc_jax.parallel import axes

MIXERS = {"memory_caching": MemoryCaching, "transformer": Attention}


class Block(nnx.Module):
  """x + mixer(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.mixer_norm = RMSNorm({"embed": config.d_model}, rngs=rngs)
    self.mixer = MIXERS[config.mixer](config, rngs=rngs)
    self.mlp_norm = RMSNorm({"embed": config.d_model}, rngs=rngs)
    self.mlp = SwiGLU(config, rngs=rngs)

  def __call__(self, x: jax.Array, document: jax.Array | None = None) -> jax.Array:
    """x [batch, length, d_model] to the same shape and dtype.

    Args:
      document: [batch, length] int32, number of each token's document, 0 at padding; None: a row
        is one document.
    """
    x = axes.constrain(x + self.mixer(self.mixer_norm(x), document), axes.RESIDUAL)
    return axes.constrain(x + self.mlp(self.mlp_norm(x)), axes.RESIDUAL)
