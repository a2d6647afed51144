"""A residual block: a mixer across tokens, a SwiGLU within each."""

import jax
from flax import nnx

from mc_jax.models.attention import Attention
from mc_jax.models.cache import CacheConfig, LayerCache
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
    return self.after_mixer(x, self.mixer(self.mixer_norm(x), document))

  def init_cache(self, config: CacheConfig, batch: int) -> LayerCache:
    """The cache of sequences that have no token yet."""
    return self.mixer.init_cache(config, batch)

  def prefill(self, x: jax.Array, lengths: jax.Array | None, config: CacheConfig) -> tuple[jax.Array, LayerCache]:
    """A call on whole prompts x [batch, length, d_model] of `lengths` [batch] tokens, and the cache after them."""
    y, cache = self.mixer.prefill(self.mixer_norm(x), lengths, config)
    return self.after_mixer(x, y), cache

  def step(
    self, x: jax.Array, cache: LayerCache, active: jax.Array | None, config: CacheConfig
  ) -> tuple[jax.Array, LayerCache]:
    """A call on the next token x [batch, 1, d_model] of the sequences that are active [batch] (None: all are)."""
    y, cache = self.mixer.step(self.mixer_norm(x), cache, active, config)
    return self.after_mixer(x, y), cache

  def after_mixer(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """The rest of a call on x, of which the mixer made y."""
    x = axes.constrain(x + y, axes.RESIDUAL)
    return axes.constrain(x + self.mlp(self.mlp_norm(x)), axes.RESIDUAL)
