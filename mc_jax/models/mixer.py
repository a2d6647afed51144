"""The Memory Caching mixer: projections around `memory.memory_caching` (arXiv:2602.24281)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax import memory
from mc_jax.memory import arithmetic, decode
from mc_jax.models.cache import CacheConfig, LayerCache
from mc_jax.models.config import ModelConfig
from mc_jax.models.convolution import CausalConvolution
from mc_jax.models.gates import TokenGates
from mc_jax.models.linear import Linear, parameter, residual_scale
from mc_jax.models.norms import RMSNorm, l2_normalize
from mc_jax.parallel import axes, context, decoding

# How loud what memories have learned is beside what M_0 answers, when training begins. It is noise to a model that does
# not yet know what to ask: louder, text is learned more slowly; quieter, recall is (docs/writing.md).
LEARNED = 0.7


class Inputs(NamedTuple):
  """What a layer makes of its tokens.

  Attributes:
    tokens: what their memories are given: q, k, v, u in the computation's dtype, query and key of unit length; gates
      and scores float32.
    output_gate: like q, before its SiLU.
    convolved: what the convolutions are given, {"query", "key", "value": like q}.
  """

  tokens: memory.Tokens
  output_gate: jax.Array
  convolved: dict[str, jax.Array]


class Own(NamedTuple):
  """What a layer keeps of a batch of sequences, but for its slots.

  Attributes:
    tails: what each convolution has yet to see again, {name: [batch, conv_width - 1, heads, head_dim]}.
    memory: without its memories and summaries, which are the slots.
  """

  tails: dict[str, jax.Array]
  memory: decode.Cache


class MemoryCaching(nnx.Module):
  """Projects tokens, lets the memories write and read, norms, gates and projects back.

  q, k and v are linear maps of x, a short convolution and SiLU, then q and k have unit length per
  head. The connector u_t = x_t W_u is a plain linear map (arXiv:2602.24281, section 3).
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    config = dataclasses.replace(config, memory=config.memory.as_read())
    self.config = config
    self.rule = config.memory.build_rule()
    embed = {"embed": config.d_model}
    heads = {"heads": config.heads, "head_dim": config.head_dim}
    # Queries, keys, values, output gates and connectors by one product, whose gradient in x is added up over the
    # mesh once and not five times.
    #
    # Connectors have unit variance, hence |u| near sqrt(head_dim): pooled keys of different segments lie close
    # together, and the scores must tell them apart. On text (head_dim 64, segments of 256) they start with a standard
    # deviation of 0.1 over a token's segments, against 0.01 for u = q of unit length. Larger is not better: a summary
    # of few keys is longer, so that in a young segment the same factor makes the online gate all or nothing.
    projections = {"projection": 5 if has_connector(config) else 4, **heads}
    self.projection = Linear(embed, projections, dtype=config.dtype, rngs=rngs)
    for name in ("query", "key", "value"):
      setattr(self, f"{name}_convolution", CausalConvolution(heads, config.conv_width, rngs=rngs))
    if self.rule.gates:
      sizes = config.d_model, config.heads, config.head_dim
      self.token_gates = TokenGates(self.rule, _longest_segment(config), *sizes, rngs=rngs)
    if config.memory.gate == "token":
      ages = {"heads": config.heads, "age": config.ages}
      self.age_scores = Linear(embed, ages, rngs=rngs)
    if self.rule.learned_init:
      start = self.rule.init(rngs.params(), heads=config.heads, head_dim=config.head_dim)
      names = ("heads", "memory_in", "memory_out")
      self.initial = nnx.Dict({name: parameter(lambda *_, w=w: w, w.shape, names, rngs) for name, w in start.items()})
    if self.rule.initial_apart:
      self.initial_norm = RMSNorm(heads, rngs=rngs)
    self.norm = RMSNorm(heads, LEARNED if self.rule.initial_apart else 1.0, rngs=rngs)
    self.output = Linear(heads, embed, dtype=config.dtype, scale=residual_scale(config.layers), rngs=rngs)

  def __call__(self, x: jax.Array, document: jax.Array | None = None) -> jax.Array:
    """x [batch, length, d_model] to the same shape, in the computation's dtype.

    Args:
      document: [batch, length] int32, number of each token's document, 0 at padding; None: a row
        is one document.
    """
    config = self.config.memory
    inputs = self.project(x, document)
    read_buffer = config.read_buffer_mib << 20
    y = context.run(inputs.tokens, self.initial_memory(), config.build_options(), read_buffer=read_buffer)
    return self.read_out(y, inputs, document)

  def init_cache(self, config: CacheConfig, batch: int) -> LayerCache:
    """The cache of sequences that have no token yet."""
    heads, head_dim = self.config.heads, self.config.head_dim
    memory = decoding.init_cache(
      self.options(config),
      self.initial_memory(),
      batch=batch,
      head_dim=head_dim,
      dtype=jnp.dtype(self.config.dtype),
    )
    tail = jnp.zeros((batch, self.config.conv_width - 1, heads, head_dim), self.config.dtype)
    return _layer_cache(dict.fromkeys(("query", "key", "value"), tail), memory)

  def prefill(self, x: jax.Array, lengths: jax.Array | None, config: CacheConfig) -> tuple[jax.Array, LayerCache]:
    """A call on whole prompts x [batch, length, d_model] of `lengths` [batch] tokens, and the cache after them."""
    inputs = self.project(x)
    initial = self.initial_memory()
    y, memory = decoding.prefill(self.options(config), inputs.tokens, initial, lengths=lengths)
    tails = {name: self.query_convolution.tail(x, lengths) for name, x in inputs.convolved.items()}
    return self.read_out(y, inputs), _layer_cache(tails, memory)

  def step(
    self, x: jax.Array, cache: LayerCache, active: jax.Array | None, config: CacheConfig
  ) -> tuple[jax.Array, LayerCache]:
    """A call on the next token x [batch, 1, d_model] of the sequences that are active [batch] (None: all are)."""
    tails = cache.own.tails
    inputs = self.project(x, tails=tails)
    before = cache.own.memory._replace(**cache.slots, first=cache.first)
    y, memory = decoding.step(self.options(config), inputs.tokens, self.initial_memory(), before, active=active)

    def moved_on(tail, x):
      new = jnp.concatenate([tail, x], axis=1)[:, 1:]
      return new if active is None else jnp.where(active[:, None, None, None], new, tail)

    tails = {name: moved_on(tail, inputs.convolved[name]) for name, tail in tails.items()}
    return self.read_out(y, inputs), _layer_cache(tails, memory)

  def options(self, config: CacheConfig) -> decode.Options:
    """What the layer's memories are, for decoding."""
    sizes = {"capacity": config.segments(self.config), "cache_dtype": config.dtype, "memory": config.memory}
    return self.config.memory.build_options(decode.Options, **sizes)

  def project(
    self, x: jax.Array, document: jax.Array | None = None, tails: dict[str, jax.Array] | None = None
  ) -> Inputs:
    """What the memories are given for the tokens x [batch, length, d_model].

    Args:
      document: as of a call.
      tails: of the tokens before x, see `Own`; None: there are none.
    """
    projected = axes.constrain(self.projection(x), (*axes.TOKENS, None, "heads", None))
    query, key, value, output_gate, *connector = (projected[:, :, i] for i in range(projected.shape[2]))
    convolved = {"query": query, "key": key, "value": value}

    def convolve(name):
      convolution = getattr(self, f"{name}_convolution")
      return jax.nn.silu(convolution(convolved[name], document, tails and tails[name]))

    q = l2_normalize(convolve("query"))
    tokens = memory.Tokens(
      q=q,
      k=l2_normalize(convolve("key")),
      v=convolve("value"),
      u=connector[0] if connector else q,
      gates=self.token_gates(x) if self.rule.gates else {},
      documents=None if document is None else memory.documents.index(document),
      token_scores=self.age_scores(x) if self.config.memory.gate == "token" else None,
    )
    return Inputs(tokens, output_gate, convolved)

  def initial_memory(self) -> memory.networks.Weights:
    """M_0: {weight: [heads, in, out]} float32, learned or the rule's constant."""
    if self.rule.learned_init:
      return {name: weight[...] for name, weight in self.initial.items()}
    heads, head_dim = self.config.heads, self.config.head_dim
    return self.rule.init(jax.random.key(0), heads=heads, head_dim=head_dim)

  def read_out(self, y: jax.Array, inputs: Inputs, document: jax.Array | None = None) -> jax.Array:
    """(RMSNorm(y) * SiLU(x W_g)) W_o: the memories' answers y, normed by head, back to d_model.

    Where M_0 is as loud as what memories have learned (`Rule.initial_apart`), y - M_0(q) and M_0(q), which has the
    network's own skip in it, are normed each by itself and added: of many caches weighed alike one holds what is asked
    for, and all hold M_0's answer, beside which a norm of the sum would leave little of the rest.
    """
    if self.rule.initial_apart:
      untaught = self.untaught(inputs.tokens.q, document)
      read = self.norm(y - untaught) + self.initial_norm(untaught)
    else:
      read = self.norm(y)
    return self.output(read * jax.nn.silu(inputs.output_gate))

  def untaught(self, q: jax.Array, document: jax.Array | None) -> jax.Array:
    """M_0(q), like q [batch, length, heads, head_dim]; 0 at padding, as memories' answers are."""
    if document is not None:
      q = jnp.where((document > 0)[:, :, None, None], q, 0)
    network, weights = self.rule.network, self.initial_memory()
    y = network(jnp.moveaxis(q, 2, 1), arithmetic.dense(weights, q.dtype))
    return jnp.moveaxis(y, 1, 2).astype(q.dtype)


def _layer_cache(tails: dict[str, jax.Array], memory: decode.Cache) -> LayerCache:
  slots = {"memories": memory.memories, "summaries": memory.summaries}
  return LayerCache(slots, memory.first, Own(tails, memory._replace(memories=None, summaries=None, first=None)))


def has_connector(config: ModelConfig) -> bool:
  """Whether the layer has a W_u: only where scores come from it (gates, or the choice of ssc)."""
  options = config.memory
  own = not options.shared_query and options.gate != "token"
  return own and memory.gates.scored(options.aggregation, options.gate)


def _longest_segment(config):
  if config.memory.segmentation == "constant":
    return config.memory.segment_length
  return max(config.memory.build_segmentation().lengths(config.max_length))
