"""The Memory Caching layer: projections around `memory.memory_caching` (arXiv:2602.24281), and its answers."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax import memory
from mc_jax.memory import arithmetic, caching, decode
from mc_jax.models import forms, layer, memory_sizes, problems
from mc_jax.models.cache import CacheConfig, LayerCache
from mc_jax.models.convolution import CausalConvolution
from mc_jax.models.layer import PLAIN, Context, Work
from mc_jax.models.linear import Linear, LowRank, parameter, residual_scale
from mc_jax.models.norms import LayerNorm, RMSNorm, l2_normalize
from mc_jax.models.rotary import rotate
from mc_jax.models.token_gates import TokenGates
from mc_jax.parallel import axes, decoding
from mc_jax.parallel import context as on_mesh

if TYPE_CHECKING:
  from mc_jax.models.config import ModelConfig

# How loud what memories have learned is beside what M_0 answers, when training begins. It is noise to a model that does
# not yet know what to ask: louder, text is learned more slowly; quieter, recall is (docs/writing.md).
LEARNED = 0.7


class Inputs(NamedTuple):
  """What a layer makes of its tokens.

  Attributes:
    tokens: what their memories are given: q, k, v, u in the computation's dtype; gates and scores float32.
    output_gate: like v, before its activation; None: there is none.
    convolved: what the convolutions are given, {"query", "key", "value": [batch, length, *heads and width]}; or {}.
  """

  tokens: memory.Tokens
  output_gate: jax.Array | None
  convolved: dict[str, jax.Array]


class Own(NamedTuple):
  """A layer's cache for a batch of sequences, except for its slots.

  Attributes:
    tails: what each convolution has yet to see again, {name: [batch, conv_width - 1, *heads and width]}.
    memory: without its memories and summaries, which are the slots.
  """

  tails: dict[str, jax.Array]
  memory: decode.Cache


@layer.register("memory")
class MemoryCaching(layer.Mixer):
  """Projects tokens, lets the memories write and read, norms, gates and projects back.

  How, a form says (forms.py). By default q, k and v are linear maps of x, a short convolution and SiLU, then q and k
  have unit length per head. The connector u_t = x_t W_u is a plain linear map (arXiv:2602.24281, section 3).
  """

  has_memories = True
  endless = True
  host_cache = "model.memory.aggregation='ssc'"

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    config = dataclasses.replace(config, memory=config.memory.as_read())
    self.config = config
    self.rule = config.memory.build_rule()
    self.form, self.sizes = forms.of(config.memory), memory_sizes.sizes(config)
    embed = {"embed": config.d_model}
    keys, values = self.sizes.keys, self.sizes.values
    # Queries, keys, values, output gates and connectors by one product, where they are alike, whose gradient in x is
    # added up over the mesh once and not five times; else by one a shape.
    #
    # Connectors have unit variance, hence |u| near sqrt(head_dim): pooled keys of different segments lie close
    # together, and the scores must tell them apart. On text (head_dim 64, segments of 256) they start with a standard
    # deviation of 0.1 over a token's segments, against 0.01 for u = q of unit length. Larger is not better: a summary
    # of few keys is longer, so that in a young segment the same factor makes the online gate all or nothing.
    self.projected = _projected(config)
    for module, names in self.projected:
      shape = values if "value" in names else keys
      projections = {"projection": len(names), **shape}
      setattr(self, module, Linear(embed, projections, dtype=config.dtype, rngs=rngs))
    if self.form.convolution:
      for name, shape in (("query", keys), ("key", keys), ("value", values)):
        convolution = CausalConvolution(shape, config.conv_width, bias=self.form.convolution_bias, rngs=rngs)
        setattr(self, f"{name}_convolution", convolution)
    if self.rule.gates:
      widths = config.d_model, self.sizes.memories, self.sizes.key_dim
      self.token_gates = TokenGates(self.rule, _longest_segment(config), *widths, self.form.gates, rngs=rngs)
    if config.memory.gate == "token":
      ages = {"heads": self.sizes.memories, "age": config.ages}
      self.age_scores = Linear(embed, ages, rngs=rngs)
    if self.rule.learned_init:
      start = memory_sizes.fresh(self.rule, self.sizes, rngs.params())
      names = ("heads", "memory_in", "memory_out")
      self.initial = nnx.Dict({name: parameter(lambda *_, w=w: w, w.shape, names, rngs) for name, w in start.items()})
    if self.form.gate_rank is not None:
      self.output_gate = LowRank(embed, self.sizes.value_dim, values, bias=True, dtype=config.dtype, rngs=rngs)
    if self.form.skip:
      self.skip = parameter(jax.nn.initializers.ones, (self.sizes.memories,), ("heads",), rngs)
    if self.rule.initial_apart:
      self.initial_norm = self._norm(1.0, rngs)
    self.norm = self._norm(LEARNED if self.rule.initial_apart else 1.0, rngs)
    self.output = Linear(values, embed, dtype=config.dtype, scale=residual_scale(config.layers), rngs=rngs)

  def _norm(self, start: float, rngs: nnx.Rngs) -> RMSNorm | LayerNorm:
    """The form's norm of what memories answer, whose scale begins at `start`."""
    if self.form.norm == "layer":
      return LayerNorm(self.sizes.values, start, rngs=rngs)
    groups = self.sizes.key_heads if self.form.norm == "group" else None
    return RMSNorm(self.sizes.values, start, groups=groups, rngs=rngs)

  def __call__(self, x: jax.Array, context: Context = PLAIN, cache: LayerCache | None = None) -> tuple[jax.Array, Any]:
    """See `layer.Mixer`."""
    before = {} if cache is None else {"tails": cache.own.tails, "start": cache.own.memory.position}
    inputs = self.project(x, context.document, **before)
    if cache is not None:
      y, left = self._step(inputs, cache, context)
    elif context.cache is not None:
      y, left = self._prefill(inputs, context)
    elif context.observe is not None:
      y, cached = self._observed(inputs)
      left = context.observe(cached)
    else:
      options, buffer = self.config.memory.build_options(), self.config.memory.read_buffer_mib << 20
      y, left = on_mesh.run(inputs.tokens, self.initial_memory(), options, read_buffer=buffer), None
    return self.read_out(y, inputs, context.document), left

  def _observed(self, inputs: Inputs) -> tuple[jax.Array, caching.Cached]:
    """The memories' answers to whole rows, by XLA, and what its passes leave behind."""
    options = dataclasses.replace(self.config.memory.build_options(), implementation="xla")
    return caching.run_part(inputs.tokens, self.initial_memory(), options, keep=True)

  def init_cache(self, config: CacheConfig, batch: int) -> LayerCache:
    """The cache of sequences that have no token yet."""
    memory = decoding.init_cache(
      self.options(config),
      self.initial_memory(),
      batch=batch,
      head_dim=self.sizes.key_dim,
      dtype=jnp.dtype(self.config.dtype),
    )
    keys, values = ((batch, self.config.conv_width - 1, *x.values()) for x in (self.sizes.keys, self.sizes.values))
    shapes = {"query": keys, "key": keys, "value": values} if self.form.convolution else {}
    return _layer_cache({name: jnp.zeros(shape, self.config.dtype) for name, shape in shapes.items()}, memory)

  def _prefill(self, inputs: Inputs, context: Context) -> tuple[jax.Array, LayerCache]:
    """The memories' answers to whole prompts, and the cache after them."""
    initial = self.initial_memory()
    y, memory = decoding.prefill(self.options(context.cache), inputs.tokens, initial, lengths=context.lengths)
    tails = {
      name: getattr(self, f"{name}_convolution").tail(x, context.lengths) for name, x in inputs.convolved.items()
    }
    return y, _layer_cache(tails, memory)

  def _step(self, inputs: Inputs, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
    """The memories' answers to the next token of the rows that are active, and the cache after it."""
    active = context.active
    before = cache.own.memory._replace(**cache.slots, first=cache.first)
    y, memory = decoding.step(self.options(context.cache), inputs.tokens, self.initial_memory(), before, active=active)

    def moved_on(tail, x):
      new = jnp.concatenate([tail, x], axis=1)[:, 1:]
      return new if active is None else jnp.where(active[:, None, None, None], new, tail)

    tails = {name: moved_on(tail, inputs.convolved[name]) for name, tail in cache.own.tails.items()}
    return y, _layer_cache(tails, memory)

  def options(self, config: CacheConfig) -> decode.Options:
    """What the layer's memories are, for decoding."""
    sizes = {"capacity": capacity(self.config, config), "cache_dtype": config.dtype, "memory": config.memory}
    return self.config.memory.build_options(decode.Options, **sizes)

  def project(
    self,
    x: jax.Array,
    document: jax.Array | None = None,
    tails: dict[str, jax.Array] | None = None,
    start: jax.Array | None = None,
  ) -> Inputs:
    """What the memories are given for the tokens x [batch, length, d_model].

    Args:
      document: as of a call.
      tails: of the tokens before x, see `Own`; None: there are none.
      start: [batch] int32, the number of tokens before x; None: there are none.
    """
    form, sizes, made = self.form, self.sizes, {}
    for module, names in self.projected:
      projected = axes.constrain(getattr(self, module)(x), (*axes.TOKENS, None, "heads", None))
      made |= {name: projected[:, :, i] for i, name in enumerate(names)}
    if form.gate_rank is not None:
      made["output_gate"] = axes.constrain(self.output_gate(x), axes.HEADS)
    convolved = {name: made[name] for name in ("query", "key", "value")} if form.convolution else {}
    for name, before in convolved.items():
      convolution = getattr(self, f"{name}_convolution")
      made[name] = jax.nn.silu(convolution(before, document, tails and tails[name]))
    if form.unit_keys:
      made |= {name: l2_normalize(made[name]) for name in ("query", "key")}
    if form.rotary is not None:
      # Connectors too: they are compared with keys. Only differences of positions count, so that a document may begin
      # anywhere.
      place = jnp.arange(x.shape[1], dtype=jnp.int32)[None] + (0 if start is None else start[:, None])
      turned = [name for name in ("query", "key", "connector") if name in made]
      made |= {name: rotate(made[name], place, form.rotary) for name in turned}
    q = made["query"] * sizes.key_dim**-0.5 if form.query_scale else made["query"]
    q, k, u = (_for_memories(y, sizes) for y in (q, made["key"], made.get("connector", made["query"])))
    tokens = memory.Tokens(
      q=q,
      k=k,
      v=made["value"],
      u=u,
      gates=self.token_gates(x) if self.rule.gates else {},
      documents=None if document is None else memory.documents.index(document),
      token_scores=self.age_scores(x) if self.config.memory.gate == "token" else None,
    )
    return Inputs(tokens, made.get("output_gate"), convolved)

  def initial_memory(self) -> memory.networks.Weights:
    """M_0: {weight: [heads, in, out]} float32, learned or the rule's constant."""
    if self.rule.learned_init:
      return {name: weight[...] for name, weight in self.initial.items()}
    return memory_sizes.fresh(self.rule, self.sizes, jax.random.key(0))

  def read_out(self, y: jax.Array, inputs: Inputs, document: jax.Array | None = None) -> jax.Array:
    """(RMSNorm(y) * SiLU(x W_g)) W_o, or as the form has it: the memories' answers y, normed by head, back to d_model.

    Where M_0 is as loud as what memories have learned (`Rule.initial_apart`), y - M_0(q) and M_0(q), which has the
    network's own skip in it, are normed each by itself and added: of many caches weighed alike one holds what is asked
    for, and all hold M_0's answer, beside which a norm of the sum would leave little of the rest.
    """
    gate = 1 if inputs.output_gate is None else _ACTIVATIONS[self.form.output_gate](inputs.output_gate)
    first, last = (gate, 1) if self.form.gate_first else (1, gate)
    if self.form.skip:
      y += self.skip[...].astype(y.dtype)[:, None] * inputs.tokens.v
    if self.rule.initial_apart:
      untaught = self.untaught(inputs.tokens.q, document)
      read = self.norm((y - untaught) * first) + self.initial_norm(untaught * first)
    else:
      read = self.norm(y * first)
    return self.output(read * last)

  def untaught(self, q: jax.Array, document: jax.Array | None) -> jax.Array:
    """M_0(q), like q [batch, length, heads, head_dim]; 0 at padding, as memories' answers are."""
    if document is not None:
      q = jnp.where((document > 0)[:, :, None, None], q, 0)
    network, weights = self.rule.network, self.initial_memory()
    y = network(jnp.moveaxis(q, 2, 1), arithmetic.dense(weights, q.dtype))
    return jnp.moveaxis(y, 1, 2).astype(q.dtype)

  @classmethod
  def problems(cls, config: ModelConfig, prefix: str) -> list[str]:
    """Heads and widths must fit each other, the form and the rule's network."""
    if config.memory.problems():  # heads and widths cannot be told, and these lines are listed anyway
      return []
    options, form, sizes = config.memory, forms.of(config.memory), memory_sizes.sizes(config)
    name, found = f"{prefix}.memory", []
    if sizes.memories % sizes.key_heads:
      found.append(
        f"{memory_sizes.memories_field(config, prefix)} must be a multiple of the heads of queries and keys, "
        f"{sizes.key_heads} ({name}.key_heads={options.key_heads}, {prefix}.heads={config.heads})"
      )
    expand_v = form.expand_v if options.expand_v is None else options.expand_v
    if not math.isclose(sizes.value_dim, expand_v * sizes.key_dim) or sizes.value_dim < 1:
      found.append(
        f"{name}.expand_v={expand_v} makes values {expand_v * sizes.key_dim} wide, for keys are {sizes.key_dim}: their "
        "product must be a whole number"
      )
    elif sizes.value_dim != sizes.key_dim:
      try:
        # The key inside, where it is traced: a real one starts JAX's devices, and processes must find each other first.
        jax.eval_shape(lambda: memory_sizes.fresh(options.build_rule(), sizes, jax.random.key(0)))
      except ValueError as error:
        found.append(f"{name}.expand_v={expand_v} does not go together with {name}.rule={options.rule!r}: {error}")
    if form.rotary is not None and sizes.key_dim % 2:
      found.append(
        f"{name}.key_dim={options.key_dim} makes keys {sizes.key_dim} wide, which is odd: the rotary positions of "
        f"{name}.form={options.form or options.rule!r} turn pairs"
      )
    return found

  @classmethod
  def label(cls, config: ModelConfig) -> str:
    """Rule and aggregation."""
    return f"{config.memory.rule} + {config.memory.aggregation}"

  @classmethod
  def learns_densely(cls, config: ModelConfig) -> bool:
    """Whether scores choose caches."""
    return config.memory.learns_densely

  @classmethod
  def data_problems(cls, config: ModelConfig, length: int, documents: bool) -> list[str]:
    """Age scores are for rows up to max_length, and logarithmic segments for rows of one document."""
    found, options = [], config.memory
    if options.gate == "token" and length > config.max_length:
      found.append(
        f"data.length={length} is more than model.max_length={config.max_length}, which "
        "model.memory.gate='token' needs: use a model.max_length of at least data.length"
      )
    if options.segmentation == "logarithmic" and documents:
      found.append(
        "model.memory.segmentation='logarithmic' does not go together with data.documents=True nor with packed rows: "
        "use segmentation='constant', or data.packing.method='windows' and data.documents=False"
      )
    return found

  @classmethod
  def mesh_problems(cls, config: ModelConfig, length: int, sizes: dict[str, int]) -> list[str]:
    """Heads are split, and segments with mesh.context; the reference runs on one device."""
    options, context = config.memory, sizes["context"]
    found = problems.indivisible(
      memory_sizes.sizes(config).memories, memory_sizes.memories_field(config, "model"), sizes, "model"
    )
    if options.implementation == "reference" and math.prod(sizes.values()) > 1:
      found.append("model.memory.implementation='reference' runs on one device: use None, xla or pallas on a mesh")
    if context == 1:
      return found
    if memory.segments.divides(options.build_segmentation(), length, context):
      if length // context <= (lookback := options.build_rule().lookback):
        found.append(
          f"the window of model.memory.rule={options.rule!r}, {lookback + 1} tokens, must fit the tokens of a device, "
          f"data.length={length} / mesh.context={context} = {length // context}"
        )
    elif options.segmentation != "constant":
      found.append(
        f"mesh.context={context} needs model.memory.segmentation='constant', got {options.segmentation!r}: "
        "devices hold equally many segments"
      )
    else:
      segments, left = divmod(length, options.segment_length)
      found.append(
        f"data.length={length} has {segments}{' whole' if left else ''} segments of model.memory.segment_length="
        f"{options.segment_length}, which do not divide among mesh.context={context}: use a data.length that "
        f"is a multiple of {options.segment_length * context}, another model.memory.segment_length"
        + ("" if left else f", or a mesh.context that is one of {problems.divisors(segments, sizes)}")
      )
    return found

  @classmethod
  def pages(cls, config: ModelConfig) -> bool:
    """A step of ssc reads few states."""
    return config.memory.as_read().selects

  @classmethod
  def cache_problems(cls, config: ModelConfig, cache: CacheConfig, prefix: str) -> list[str]:
    """Segments must be cut the same whatever is still to come, and there must be room for their states."""
    options = config.memory.as_read()
    if not options.build_segmentation().extends:
      return [
        f"model.memory.segmentation={options.segmentation!r} cannot be decoded: where segments are cut depends on the "
        "length of the sequence; use segmentation='constant'"
      ]
    if options.gate == "token" and decode.capacity_for(options.segment_length, cache.tokens) > config.ages:
      return [
        f"{prefix}.tokens={cache.tokens:,} make more segments than model.max_length={config.max_length}, which "
        "model.memory.gate='token' has scores for"
      ]
    if cache.full == "error" and options.reads_caches:
      try:
        decode.require_room(options.segment_length, capacity(config, cache), cache.tokens)
      except decode.CacheFull as error:
        return [f"{prefix}.capacity={cache.capacity} is too small: {error}, or {prefix}.full='drop_oldest'"]
    return []

  @classmethod
  def work(cls, config: ModelConfig, length: int, context: int) -> Work:
    """Writes, and reads of the caches that a token has, on the average."""
    options = config.memory
    caches = len(options.build_segmentation().lengths(length))
    read = options.top_k if options.selects else caches / 2 if options.reads_caches else 0
    network = 2 * memory_sizes.sizes(config).memories * memory_sizes.memory_numbers(config)
    # Deep memories that go from segment to segment go from device to device: each waits for those before it.
    chained = options.carry == "checkpoint" and options.build_rule().transition is None
    return Work(
      parameters=config.d_model * memory_sizes.channels(config),
      flops=4 * read * network + (0 if chained else 16 * network),
      chained_flops=16 * network if chained else 0,
    )

  @classmethod
  def cache_bytes(cls, config: ModelConfig, length: int) -> dict[str, float]:
    """One cached memory, in the computation's dtype; all of them, one a segment; and their pooled keys, float32."""
    options = config.memory.as_read()
    caches = 0 if not options.reads_caches else len(options.build_segmentation().lengths(length))
    sizes = memory_sizes.sizes(config)
    checkpoint = sizes.memories * memory_sizes.memory_numbers(config) * jnp.dtype(config.dtype).itemsize
    summaries = caches * sizes.memories * sizes.key_dim * 4
    return {"checkpoint": checkpoint, "sequence": caches * checkpoint, "summaries": summaries}

  @classmethod
  def segment_bytes(cls, config: ModelConfig, length: int) -> float:
    """Float32 states, momentum with them where there is any."""
    caches, memories = len(config.memory.build_segmentation().lengths(length)), memory_sizes.sizes(config).memories
    return 4 * caches * memories * memory_sizes.state_numbers(config)


_ACTIVATIONS = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


def _layer_cache(tails: dict[str, jax.Array], memory: decode.Cache) -> LayerCache:
  slots = {"memories": memory.memories, "summaries": memory.summaries}
  return LayerCache(slots, memory.first, Own(tails, memory._replace(memories=None, summaries=None, first=None)))


def has_connector(config: ModelConfig) -> bool:
  """Whether the layer has a W_u: only where scores come from it (gates, or the choice of ssc)."""
  options = config.memory
  own = not options.shared_query and options.gate != "token"
  return own and memory.aggregate.scored(options.aggregation, options.gate)


def _projected(config: ModelConfig) -> tuple[tuple[str, tuple[str, ...]], ...]:
  """What linear maps of x there are: (the module's name, what it makes, in order), all of one shape by one module."""
  form, sizes = forms.of(config.memory), memory_sizes.sizes(config)
  connector = ("connector",) if has_connector(config) else ()
  values = ("value", "output_gate") if form.output_gate is not None and form.gate_rank is None else ("value",)
  if sizes.keys == sizes.values:
    return (("projection", ("query", "key", *values, *connector)),)
  return ("projection", ("query", "key", *connector)), ("value_projection", values)


def _for_memories(x: jax.Array, sizes: memory_sizes.Sizes) -> jax.Array:
  """x [batch, length, key_heads, key_dim] to [batch, length, memories, key_dim]."""
  return x if sizes.shared == 1 else axes.constrain(jnp.repeat(x, sizes.shared, axis=2), axes.HEADS)


def _longest_segment(config):
  if config.memory.segmentation == "constant":
    return config.memory.segment_length
  return max(config.memory.build_segmentation().lengths(config.max_length))


def capacity(config: ModelConfig, cache: CacheConfig) -> int:
  """Segments whose states a layer can keep."""
  length = config.memory.as_read().segment_length
  return decode.capacity_for(length, cache.tokens) if cache.capacity is None else cache.capacity
