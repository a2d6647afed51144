"""The language model: tokens to the logits of the next token."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax import memory
from mc_jax.models import cache as cache_lib
from mc_jax.models.block import Block
from mc_jax.models.cache import Cache, CacheConfig, LayerCache
from mc_jax.models.config import ModelConfig
from mc_jax.models.layer import KEPT, Context
from mc_jax.models.linear import Linear, parameter
from mc_jax.models.norms import RMSNorm
from mc_jax.parallel import axes

_KEPT = jax.checkpoint_policies.save_only_these_names(KEPT)
_REMAT_POLICIES = {
  "full": _KEPT,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    _KEPT, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
}


_EMBEDDING = ("vocab", "embed")


class LanguageModel(nnx.Module):
  """Embedding, `config.layers` blocks under one `jax.lax.scan`, a norm and a readout.

  Parameters are float32. Those of the blocks are stacked on a leading axis "layers": all of them where the model's
  period is one block; else `blocks` holds {"0": ..., "1": ...}, for each place in the period the blocks there. The
  computation runs in `config.dtype`; norms, gates, memories' states and logits are float32.

  Args:
    config: the model; see `ModelConfig`.
    rngs: its `params` stream initialises the parameters.

  Raises:
    ValueError: the config has problems; all are listed.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    if problems := config.problems():
      raise ValueError("\n".join(problems))
    self.config = config
    # Rows of unit length keep tied logits near unit variance; the lookup scales them back up.
    self.embedding = parameter(
      jax.nn.initializers.normal(config.d_model**-0.5),
      (config.vocab_size, config.d_model),
      _EMBEDDING,
      rngs,
    )
    blocks = [_stacked_blocks(config, place, rngs) for place in range(config.period)]
    self.blocks = blocks[0] if len(blocks) == 1 else nnx.Dict({str(i): block for i, block in enumerate(blocks)})
    self.norm = RMSNorm({"embed": config.d_model}, rngs=rngs)
    if not config.tied_embeddings:
      embed, vocab = {"embed": config.d_model}, {"vocab": config.vocab_size}
      self.readout = Linear(embed, vocab, rngs=rngs)
    shared = {kind.name: kind.shared(config, rngs=rngs) for kind in config.kinds}
    if shared := {name: module for name, module in shared.items() if module is not None}:
      self.shared = nnx.Dict(shared)

  def __call__(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Logits of the token that follows each.

    Args:
      tokens: [batch, length] int32.
      segment_ids: [batch, length] int32 of packed documents: 0 is padding, a document is a maximal
        run of one nonzero id. None: every row is one document.

    Returns:
      [batch, length, vocab_size] float32; finite and without meaning at padding.
    """
    document = None if segment_ids is None else number_documents(segment_ids)
    x, _ = self.run(self.embed(tokens), self.context(document=document), remat=self.config.remat)
    return axes.constrain(self.logits(x), (*axes.TOKENS, "vocab"))

  def init_cache(self, config: CacheConfig, batch: int) -> Cache:
    """The cache of `batch` sequences that have no token yet."""
    _, layers = self.scan(lambda block, _x, _cache: (None, block.mixer.init_cache(config, batch)), None)
    return Cache(jnp.zeros(batch, jnp.int32), tuple(map(cache_lib.stack, layers)))

  def prefill(
    self, tokens: jax.Array, config: CacheConfig, lengths: jax.Array | None = None
  ) -> tuple[jax.Array, Cache]:
    """Reads whole prompts.

    Args:
      tokens: [batch, length] int32.
      config: of the cache; static under jit.
      lengths: [batch] int32, tokens of each prompt, at least 1; what follows them is padding. None: all of them.

    Returns:
      Logits of the token that follows each prompt, [batch, vocab_size] float32, and the cache after the prompts.
    """
    batch, length = tokens.shape
    x, layers = self.run(self.embed(tokens), self.context(cache=config, lengths=lengths))
    position = jnp.full(batch, length, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    last = jnp.take_along_axis(x, position[:, None, None] - 1, axis=1)[:, 0]
    return self.logits(last), Cache(position, tuple(map(cache_lib.stack, layers)))

  def step(
    self, tokens: jax.Array, cache: Cache, config: CacheConfig, active: jax.Array | None = None
  ) -> tuple[jax.Array, Cache]:
    """Reads the next token of each sequence.

    Args:
      tokens: [batch] int32.
      cache: of the tokens before; donate it, and it is written in place.
      config: of the cache; static under jit.
      active: [batch] bool; the others' tokens are ignored, and their caches stay. None: all are.

    Returns:
      Logits of the token that follows, [batch, vocab_size] float32 (without meaning where not active), and the cache.
    """
    context = self.context(cache=config, active=active)
    x, layers = self.run(self.embed(tokens)[:, None], context, cache.layers)
    position = cache.position + (1 if active is None else active)
    return self.logits(x[:, 0]), Cache(position, layers)

  def context(self, **fields) -> Context:
    """What the layers are given, with what they share."""
    return Context(**fields, shared=dict(self.shared) if hasattr(self, "shared") else {})

  def run(
    self, x: jax.Array, context: Context, cache: tuple[LayerCache, ...] | None = None, *, remat: str = "none"
  ) -> tuple[jax.Array, tuple]:
    """All blocks on x [batch, length, d_model], one after the other; `scan` says what is returned."""
    x = axes.constrain(x, axes.RESIDUAL)
    return self.scan(lambda block, x, cache: block(x, context, cache), x, cache, remat=remat)

  def scan(
    self,
    function: Callable[[Block, Any, LayerCache | None], tuple[Any, Any]],
    x: Any,
    cache: tuple[LayerCache, ...] | None = None,
    *,
    remat: str = "none",
  ) -> tuple[Any, tuple]:
    """The loop over layers: a `jax.lax.scan` over repeats of the model's period.

    Args:
      function: (block, x, cache) -> (x, what is left); with a cache the LayerCache after it is left.
      x: What the first block is given.
      cache: Of all layers, as Cache.layers; None: there is none.
      remat: What is computed again in the backward pass, see `ModelConfig.remat`.

    Returns:
      x of the last block; and for each place in the period what its blocks left, stacked on a leading axis, or the
      caches after `cache`.
    """
    blocks = [self.blocks] if self.config.period == 1 else [self.blocks[str(i)] for i in range(self.config.period)]
    graphs, parameters = zip(*map(nnx.split, blocks), strict=True)

    def on_block(graph):
      def run(x, parameters, cache):
        return function(nnx.merge(graph, parameters), x, cache)

      if remat == "none":
        return run
      # Under scan, common subexpressions cannot undo the rematerialisation: no need to forbid them.
      return jax.checkpoint(run, policy=_REMAT_POLICIES[remat], prevent_cse=False)

    period = list(map(on_block, graphs))

    def without_cache(x, parameters):
      left = []
      for run, weights in zip(period, parameters, strict=True):
        x, after = run(x, weights, None)
        left.append(after)
      return x, tuple(left)

    def with_cache(carry, layer):
      (x, slots), (parameters, rest) = carry, layer
      after = []
      for run, weights, before, (first, own) in zip(period, parameters, slots, rest, strict=True):
        x, cache = run(x, weights, LayerCache(before, first, own))
        after.append(cache)
      return (x, tuple(cache.slots for cache in after)), tuple(cache.own for cache in after)

    if cache is None:
      return jax.lax.scan(without_cache, x, parameters)
    rest = tuple((layers.first, layers.own) for layers in cache)
    (x, slots), own = jax.lax.scan(with_cache, (x, tuple(layers.slots for layers in cache)), (parameters, rest))
    return x, tuple(LayerCache(s, layers.first, o) for s, layers, o in zip(slots, cache, own, strict=True))

  def embed(self, tokens: jax.Array) -> jax.Array:
    """tokens [...] to [..., d_model] of unit variance, in the computation's dtype."""
    # Gathered in float32, unlike other parameters: a token's gradient adds up over all the places where it stands.
    rows = axes.gathered(self.embedding[...], _EMBEDDING)[tokens] * self.config.d_model**0.5
    return rows.astype(self.config.dtype)

  def logits(self, x: jax.Array) -> jax.Array:
    """The final norm and readout: x [..., d_model] to [..., vocab_size] float32."""
    x = self.norm(x)
    table = self.embedding[...] if self.config.tied_embeddings else self.readout.kernel[...].T
    table = axes.gathered(table.astype(x.dtype), _EMBEDDING)
    return jnp.matmul(x, table.T, preferred_element_type=jnp.float32)


def number_documents(segment_ids: jax.Array) -> jax.Array:
  """Number of each token's document in its row, 1, 2, ...; 0 at padding.

  Two tokens belong to one document where their numbers are equal and not 0: what every layer asks.
  """
  documents = memory.documents.index(segment_ids)
  return jnp.where(documents.valid, documents.number, 0)


def _stacked_blocks(config: ModelConfig, place: int, rngs: nnx.Rngs) -> Block:
  """The blocks at a place of the period as one, each parameter with a leading axis "layers"."""

  @nnx.split_rngs(splits=config.repeats)
  @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
  def stack(rngs):
    return Block(config, place, rngs=rngs)

  return stack(rngs)
