"""The language model: tokens to the logits of the next token."""

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax import memory
from mc_jax.models import cache as cache_lib
from mc_jax.models.block import Block
from mc_jax.models.cache import Cache, CacheConfig, LayerCache
from mc_jax.models.config import ModelConfig
from mc_jax.models.linear import Linear, parameter
from mc_jax.models.norms import RMSNorm
from mc_jax.parallel import axes

_REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


_EMBEDDING = ("vocab", "embed")


class LanguageModel(nnx.Module):
  """Embedding, `config.layers` blocks under one `jax.lax.scan`, a norm and a readout.

  Parameters are float32; those of the blocks are stacked on a leading axis "layers". The
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
    self.blocks = _stacked_blocks(config, rngs)
    self.norm = RMSNorm({"embed": config.d_model}, rngs=rngs)
    if not config.tied_embeddings:
      embed, vocab = {"embed": config.d_model}, {"vocab": config.vocab_size}
      self.readout = Linear(embed, vocab, rngs=rngs)

  def __call__(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Logits of the token that follows each.

    Args:
      tokens: [batch, length] int32.
      segment_ids: [batch, length] int32 of packed documents: 0 is padding, a document is a maximal
        run of one nonzero id. None: every row is one document.

    Returns:
      [batch, length, vocab_size] float32; finite and without meaning at padding.
    """
    x = axes.constrain(self.embed(tokens), axes.RESIDUAL)
    document = None if segment_ids is None else number_documents(segment_ids)
    graph, layers = nnx.split(self.blocks)

    def block(x, layer):
      return nnx.merge(graph, layer)(x, document), None

    if self.config.remat != "none":
      # Under scan, common subexpressions cannot undo the rematerialisation: no need to forbid them.
      block = jax.checkpoint(block, policy=_REMAT_POLICIES[self.config.remat], prevent_cse=False)
    x, _ = jax.lax.scan(block, x, layers)
    return axes.constrain(self.logits(x), (*axes.TOKENS, "vocab"))

  def init_cache(self, config: CacheConfig, batch: int) -> Cache:
    """The cache of `batch` sequences that have no token yet."""
    graph, layers = nnx.split(self.blocks)

    def block(_, layer):
      return None, nnx.merge(graph, layer).init_cache(config, batch)

    _, layers = jax.lax.scan(block, None, layers)
    return cache_lib.stack(jnp.zeros(batch, jnp.int32), layers)

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
    x = axes.constrain(self.embed(tokens), axes.RESIDUAL)
    graph, layers = nnx.split(self.blocks)

    def block(x, layer):
      return nnx.merge(graph, layer).prefill(x, lengths, config)

    x, layers = jax.lax.scan(block, x, layers)
    position = jnp.full(batch, length, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    last = jnp.take_along_axis(x, position[:, None, None] - 1, axis=1)[:, 0]
    return self.logits(last), cache_lib.stack(position, layers)

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
    x = axes.constrain(self.embed(tokens)[:, None], axes.RESIDUAL)
    graph, layers = nnx.split(self.blocks)

    def block(carry, layer):
      x, slots = carry
      parameters, first, own = layer
      x, after = nnx.merge(graph, parameters).step(x, LayerCache(slots, first, own), active, config)
      return (x, after.slots), after.own

    before = cache.layers
    (x, slots), own = jax.lax.scan(block, (x, before.slots), (layers, before.first, before.own))
    position = cache.position + (1 if active is None else active)
    return self.logits(x[:, 0]), Cache(position, LayerCache(slots, before.first, own))

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


def _stacked_blocks(config, rngs):
  """`config.layers` blocks as one, each parameter with a leading axis "layers"."""

  @nnx.split_rngs(splits=config.layers)
  @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
  def stack(rngs):
    return Block(config, rngs=rngs)

  return stack(rngs)
