"""Decoding: a prompt at once, then token by token, with the numbers of the whole sequence's forward pass.

A token in the middle of a chunk is a chunk of one token, whose inner gradient is taken where those of its chunk are:
what a rule's `write` does for a chunk it does here for a token, told what came before it in its chunk. Scores, gates
and reads are training's own.

The finished segments' states lie in slots. A segment's state goes into its slot when the next segment's first token
comes: until then nobody reads it. When no slot is left it takes the oldest one's place; who wants an error instead asks
`require_room` before.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mc_jax.memory import aggregate, caching, pages, routing, segments, selection, xla
from mc_jax.memory import documents as documents_lib
from mc_jax.memory import options as options_lib
from mc_jax.memory import tokens as tokens_lib
from mc_jax.memory.arithmetic import solve, state_dtype
from mc_jax.memory.networks import Network, Weights
from mc_jax.memory.rules import State
from mc_jax.memory.tokens import Tokens

CACHE_DTYPES = ("float32", "bfloat16", "int8")
MEMORIES = ("device", "host")


class CacheFull(ValueError):
  """There is no slot for a segment's state."""


@dataclasses.dataclass(frozen=True)
class Options(options_lib.Options):
  """What a layer's memories are, and its cache. Static under jit.

  Attributes:
    segmentation: constant. Where logarithmic segments are cut depends on the sequence's length.
    capacity: segments whose states can be cached; see `capacity_for`.
    cache_dtype: of the cached states: float32, bfloat16, or int8 with a scale for each matrix. None: what they are
      multiplied in, q's dtype, which changes no number.
    memory: where the cached states are: on the device, or in host memory, from which a step fetches those that ssc
      selects. Summaries are on the device.

  Raises:
    ValueError: as of any options; also logarithmic segments, or states in host memory that are all read.
  """

  capacity: int = dataclasses.field(kw_only=True)
  cache_dtype: str | None = dataclasses.field(default=None, kw_only=True)
  memory: str = dataclasses.field(default="device", kw_only=True)

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.segmentation, segments.Constant):
      raise ValueError(f"only constant segments can be decoded, got {self.segmentation}")
    options_lib.at_least_one("capacity", self.capacity)
    options_lib.one_of("cache_dtype", self.cache_dtype, (None, *CACHE_DTYPES))
    options_lib.one_of("memory", self.memory, MEMORIES)
    if self.memory == "host" and aggregate.AGGREGATIONS[self.aggregation].caches != "selected":
      raise ValueError(
        f"memory='host' needs aggregation='ssc', which reads few states; {self.aggregation!r} would fetch all of them "
        "for every token"
      )

  @property
  def segment_length(self) -> int:
    """Tokens in a segment."""
    return self.segmentation.length

  @property
  def slots(self) -> int:
    """Slots of a layer: none where nothing is read from them."""
    return 0 if aggregate.AGGREGATIONS[self.aggregation].caches == "none" else self.capacity

  @property
  def chunk(self) -> int:
    """Tokens in a chunk, at most."""
    return min(self.rule.chunk, self.segment_length)


class Quantized(NamedTuple):
  """Matrices as int8 [..., in, out], each with a float32 scale [..., 1, 1]."""

  values: jax.Array
  scale: jax.Array


class Paged(NamedTuple):
  """States in host memory.

  Attributes:
    pages: [..., rows, 128], all matrices of a state; see pages.py.
    scale: of int8 matrices, {name: float32 [..., 1, 1]} on the device; else empty.
  """

  pages: jax.Array
  scale: dict[str, jax.Array]


Memories = dict[str, jax.Array | Quantized] | Paged


class Cache(NamedTuple):
  """What a layer keeps of a batch of sequences, each as long as it is.

  Attributes:
    position: [b] int32, tokens so far.
    state: what the memory carries, leaves [b, h, ...], at least float32.
    chunk: what came in the current chunk before the next token, as the rule has it; None if it is not `frozen`.
    keys: [b, h, d], the sum of the current segment's keys.
    memories: the cached states, {name: [slots, b, h, in, out]} or Quantized; Paged in host memory.
    summaries: of the cached segments, [slots, b, h, d].
    first: int32, this layer's first slot: layers may share arrays of slots, which a loop over them need not copy.
  """

  position: jax.Array
  state: State
  chunk: Any
  keys: jax.Array
  memories: Memories
  summaries: jax.Array
  first: jax.Array


def capacity_for(segment_length: int, tokens: int) -> int:
  """Slots for sequences of so many tokens: one a segment, the last one's too, which longer sequences will read."""
  return len(segments.constant(segment_length).lengths(tokens))


def require_room(segment_length: int, capacity: int, tokens: int) -> None:
  """Raises CacheFull if sequences of so many tokens drop states from a cache of this capacity."""
  needed = max(tokens - 1, 0) // segment_length
  if needed > capacity:
    raise CacheFull(
      f"{tokens:,} tokens in segments of {segment_length} need a capacity of {needed} segments, got {capacity}"
    )


def init_cache(options: Options, init: Weights, *, batch: int, head_dim: int, dtype: jnp.dtype) -> Cache:
  """The cache of sequences that have no token yet.

  Args:
    options: of the layer.
    init: M_0, {name: [heads, in, out]}.
    batch: sequences.
    head_dim: The width of the tokens' q and k.
    dtype: of the tokens' q, k and v.
  """
  heads, wide = len(next(iter(init.values()))), state_dtype(dtype)
  fresh = {name: w.astype(wide) for name, w in init.items()}
  state = options.rule.start(fresh, jnp.zeros((batch, heads, 1, head_dim), dtype))
  empty = {name: jnp.zeros((options.slots, *w.shape), wide) for name, w in state.memory.items()}
  return Cache(
    position=jnp.zeros(batch, jnp.int32),
    state=state,
    chunk=options.rule.begin(state, options.chunk, dtype) if options.rule.frozen else None,
    keys=jnp.zeros((batch, heads, head_dim), wide),
    memories=_to_memory(_store(options, empty, dtype)),
    summaries=jnp.zeros((options.slots, batch, heads, head_dim), wide),
    first=jnp.zeros((), jnp.int32),
  )


def prefill(
  options: Options, tokens: Tokens, init: Weights, *, lengths: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
  """`memory_caching` of whole prompts, and the cache from which they go on.

  Args:
    options: of the layer.
    tokens: prompts, without documents.
    init: M_0, {name: [heads, in, out]}.
    lengths: [batch] int32, tokens of each prompt, at least 1; what follows them is padding. None: all of them.

  Returns:
    [batch, length, heads, value_dim] in q's dtype, 0 at padding; and the cache.

  Raises:
    ValueError: shapes that do not fit, as `memory_caching`.
  """
  rule, size = options.rule, options.segment_length
  tokens_lib.check(tokens, init, options)
  (batch, length, heads, head_dim), dtype = tokens.q.shape, tokens.q.dtype
  if lengths is not None:
    documents = documents_lib.index((jnp.arange(length) < lengths[:, None]).astype(jnp.int32))
    tokens = tokens._replace(documents=documents)
  backend = "xla" if options.implementation == "reference" else options.implementation
  y, cached = caching.run_part(tokens, init, dataclasses.replace(options, implementation=backend), keep=True)
  position = jnp.full(batch, length, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
  segment = _segment(options, position - 1)  # of the last token
  start = segment * size
  tokens = tokens_lib.heads_first(tokens)._replace(q=None, u=None, documents=None, token_scores=None)

  # The last segment's tokens once more: what a cache needs of its middle, the pass over the sequence does not keep.
  place = jnp.minimum(start[:, None] + jnp.arange(size), length - 1)
  tokens = jax.tree.map(lambda x: _take(x, place), tokens)
  into = position - start  # tokens in the last segment
  wide = state_dtype(dtype)
  inside = jnp.arange(size) < into[:, None]
  keys = jnp.where(inside[:, None, :, None], tokens.k.astype(wide), 0).sum(2)
  chunk = None
  if rule.frozen:
    fresh = {name: w.astype(wide) for name, w in init.items()}
    first = rule.start(fresh, tokens.k)
    if options.carries:
      before = _of_rows(cached.states, jnp.maximum(segment - 1, 0))
      first = _where(segment > 0, before, first)
    whole = into // options.chunk * options.chunk  # tokens in whole chunks
    first = xla.write(
      *(rule, fresh, _valid(tokens, jnp.arange(size) < whole[:, None])._replace(q=tokens.k), (size,)),
      **dict(read=xla.read_nothing, carries=True, side_by_side=1, start=first),
    ).end
    place = whole[:, None] + jnp.arange(options.chunk)
    begun = jax.tree.map(lambda x: _take(x, jnp.minimum(place, size - 1)), tokens)
    begun = _valid(begun, place < into[:, None])
    _, online = rule.write(first, fresh, begun.k, begun.v, begun.gates, begun.documents, solve=solve)
    chunk = rule.within(online)

  held = jnp.maximum(_held(segment, options.slots), 0)

  def slots(x):  # [segments, b, ...] to [capacity, b, ...]
    return x[held.T, jnp.arange(batch)]

  summaries = jnp.zeros((held.shape[1], batch, heads, head_dim), wide)
  return y, Cache(
    position=position,
    state=_of_rows(cached.states, segment),
    chunk=chunk,
    keys=keys,
    memories=_to_memory(_store(options, {name: slots(w) for name, w in cached.states.memory.items()}, dtype)),
    summaries=summaries if cached.summaries is None else slots(cached.summaries),
    first=jnp.zeros((), jnp.int32),
  )


def step(
  options: Options, tokens: Tokens, init: Weights, cache: Cache, *, active: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
  """The next token of every sequence, wherever in its chunk and segment it is.

  Reads cost O(cached segments), of ssc O(top_k); everything else is the same for every token.

  Args:
    options: of the layer.
    tokens: one a sequence, q [batch, 1, heads, head_dim] and all else, without documents.
    init: M_0, {name: [heads, in, out]}.
    cache: of the tokens before.
    active: [batch] bool; what the others bring is not written. None: all are.

  Returns:
    [batch, 1, heads, value_dim] in q's dtype, without meaning where not active; and the cache.

  Raises:
    ValueError: shapes that do not fit, each other or the cache.
  """
  rule, dtype, before = options.rule, tokens.q.dtype, cache
  tokens_lib.check(tokens, init, options)
  shape = cache.keys.shape[0], 1, *cache.keys.shape[1:]
  if tokens.q.shape != shape:
    raise ValueError(f"q must be [batch, 1, heads, head_dim] = {shape}, as the cache has it; got {tokens.q.shape}")
  fresh = {name: w.astype(state_dtype(dtype)) for name, w in init.items()}
  x = tokens_lib.heads_first(tokens)
  cache = _enter(options, fresh, cache, x.k, active)
  state, online = rule.write(cache.state, fresh, x.k, x.v, x.gates, None, solve=solve, chunk=cache.chunk)
  cache = cache._replace(state=state, keys=cache.keys + x.k[:, :, 0].astype(cache.keys.dtype))
  if rule.frozen:
    place = cache.position % options.segment_length % options.chunk
    cache = cache._replace(chunk=rule.advance(cache.chunk, place, online, x.gates))
  y = _read(options, x, cache)
  cache = cache._replace(position=cache.position + 1)
  if active is not None:  # what is in slots was written by the active rows alone

    def by_row(cache):
      return dict(position=cache.position, state=cache.state, chunk=cache.chunk, keys=cache.keys)

    cache = cache._replace(**_where(active, by_row(cache), by_row(before)))
  return jnp.moveaxis(y, 1, 2).astype(dtype), cache


def _enter(options: Options, fresh: Weights, cache: Cache, k: jax.Array, active: jax.Array | None) -> Cache:
  """The cache as the next token finds it: at a segment's first token the last segment's state is cached."""
  inside = cache.position % options.segment_length
  begins = inside == 0
  if options.slots:
    finished = begins & (cache.position > 0) & (True if active is None else active)
    cache = _append(options, cache, finished, k.dtype)
  state = cache.state
  if not options.carries:
    state = _where(begins, options.rule.start(fresh, k), state)
  chunk = cache.chunk
  if options.rule.frozen:
    chunk = _where(inside % options.chunk == 0, options.rule.begin(state, options.chunk, k.dtype), chunk)
  keys = jnp.where(_rows(begins, cache.keys.ndim), 0, cache.keys)
  return cache._replace(state=state, chunk=chunk, keys=keys)


def _append(options: Options, cache: Cache, finished: jax.Array, dtype: jnp.dtype) -> Cache:
  """Caches the state and the summary of a segment that is finished, where it is."""
  slot = (_segment(options, cache.position) - 1) % options.slots
  rows = jnp.arange(len(slot))
  pool = routing.Pool(cache.keys, jnp.asarray(options.segment_length, cache.keys.dtype))

  def put(slots, new):  # rows that are not finished point behind the end
    return slots.at[jnp.where(finished, cache.first + slot, len(slots)), rows].set(new, mode="drop")

  if options.memory == "host":

    def of_row(row):
      state = {name: jax.lax.dynamic_index_in_dim(w, row, keepdims=False) for name, w in cache.state.memory.items()}
      return _store(options, state, dtype)

    memories = pages.write(cache.memories, cache.first + slot, finished, of_row)
  else:
    memories = jax.tree.map(put, cache.memories, _store(options, cache.state.memory, dtype))
  return cache._replace(summaries=put(cache.summaries, routing.summary(pool, options.pool)), memories=memories)


def _read(options: Options, x: Tokens, cache: Cache) -> jax.Array:
  """y [b, h, 1, value_dim], at least float32: the online memory, and the cached ones as the aggregation has it."""
  segment = _segment(options, cache.position)
  held = _held(segment, options.slots)
  wide, shape = cache.keys.dtype, x.q.shape[:3]
  scored = options.slots and aggregate.scored(options.aggregation, options.gate)
  if scored and options.gate == "token":
    ages = (segment[:, None] - held)[:, None, None]
    scores = routing.scores_by_age(x.token_scores.astype(wide), ages)
  elif scored:
    tokens = (cache.position % options.segment_length + 1).astype(wide)
    own = routing.summary(routing.Pool(cache.keys, _rows(tokens, cache.keys.ndim)), options.pool)
    summaries = jax.lax.dynamic_slice_in_dim(cache.summaries, cache.first, options.slots)
    scores = routing.online_scores(x.u, own[:, :, None]), routing.cached_scores(x.u, summaries)
  else:
    scores = jnp.zeros(shape, wide), jnp.zeros((*shape, options.slots), wide)
  count = jnp.minimum(segment.max(), options.slots)
  memories = _Memories(cache, count, x.q.dtype)
  visible = (held >= 0)[:, None, None]
  return aggregate.AGGREGATIONS[options.aggregation].read(options, x.q, scores, visible, memories)[0]


class _Memories(NamedTuple):
  """The memories of single tokens, as an `Aggregation` reads them.

  Attributes:
    cache: of these tokens too.
    count: of slots that are filled, at most.
    dtype: in which cached states are multiplied.
  """

  cache: Cache
  count: jax.Array
  dtype: jnp.dtype

  def online(self, contribution: aggregate.Contribution, x: jax.Array) -> jax.Array:
    return contribution(x, self.cache.state.memory)

  def cached(self, contribution: aggregate.Contribution, x: jax.Array, gamma: jax.Array) -> jax.Array:
    memories = self.cache.memories
    if not isinstance(memories, Paged):
      memories = contribution.weights(memories)

    def fetch(i):
      slot = functools.partial(jax.lax.dynamic_index_in_dim, index=self.cache.first + i, keepdims=False)
      return _load(jax.tree.map(slot, memories), self.dtype)

    return aggregate.sum_of_reads(contribution, x, jnp.moveaxis(gamma, -1, 0), fetch, self.count)

  def selected(self, network: Network, x: jax.Array, index: jax.Array, gamma: jax.Array) -> jax.Array:
    def fetch(index):
      cache = self.cache
      return _load(_selected(cache.memories, cache.state.memory, cache.first + index), self.dtype)

    return selection.read_few(network, x, index, gamma, fetch)


def _segment(options: Options, position: jax.Array) -> jax.Array:
  """Segment of the token at a position."""
  return jnp.maximum(position, 0) // options.segment_length


def _held(segment: jax.Array, capacity: int) -> jax.Array:
  """Which segment each slot holds while segment `segment` [b] is being written: [b, capacity], negative for none."""
  last, slot = segment[:, None] - 1, np.arange(capacity)
  return last - (last - slot) % capacity if capacity else jnp.zeros((len(segment), 0), jnp.int32)


def _selected(memories: Memories, state: Weights, slot: jax.Array) -> dict[str, jax.Array | Quantized]:
  """Of each row and head the memory in slot [b, h], {name: [b, h, in, out]}; state: like one of them."""
  rows, heads = jnp.arange(slot.shape[0])[:, None], jnp.arange(slot.shape[1])

  def here(tree):
    return jax.tree.map(lambda w: w[slot, rows, heads], tree)

  if not isinstance(memories, Paged):
    return here(memories)
  dtype = jnp.int8 if memories.scale else memories.pages.dtype
  like = {name: jax.ShapeDtypeStruct(w.shape[-2:], dtype) for name, w in state.items()}
  values = pages.unpack(pages.fetch(memories.pages, slot), like)
  return {name: Quantized(values[name], scale) for name, scale in here(memories.scale).items()} or values


def _store(options: Options, weights: Weights, dtype: jnp.dtype) -> Memories:
  """Weights [..., in, out] as they are cached, still on the device."""
  if options.cache_dtype == "int8":
    stored = {name: _quantize(w) for name, w in weights.items()}
    values, scale = ({name: w[i] for name, w in stored.items()} for i in range(2))
  else:
    stored = values = {name: w.astype(options.cache_dtype or dtype) for name, w in weights.items()}
    scale = {}
  return Paged(pages.pack(values), scale) if options.memory == "host" else stored


def _to_memory(memories: Memories) -> Memories:
  """What was stored, where it belongs."""
  return memories._replace(pages=pages.to_host(memories.pages)) if isinstance(memories, Paged) else memories


def _quantize(w: jax.Array) -> Quantized:
  scale = jnp.maximum(jnp.abs(w).max((-2, -1), keepdims=True), jnp.finfo(w.dtype).tiny) / 127
  return Quantized(jnp.round(w / scale).astype(jnp.int8), scale.astype(jnp.float32))


def _load(memories: dict[str, jax.Array | Quantized], dtype: jnp.dtype) -> Weights:
  """Cached weights as they are multiplied."""
  return {name: (w.values * w.scale).astype(dtype) if isinstance(w, Quantized) else w for name, w in memories.items()}


def _take(x: jax.Array, place: jax.Array) -> jax.Array:
  """Tokens at each row's places: x [b, h, length, ...], place [b, n] to [b, h, n, ...]."""
  return jnp.take_along_axis(x, place.reshape(len(place), 1, -1, *[1] * (x.ndim - 3)), axis=2)


def _valid(tokens: Tokens, valid: jax.Array) -> Tokens:
  """The tokens of one document, those that are not valid [b, length] as padding."""
  one = jnp.ones((len(valid), 1, valid.shape[1]), jnp.int32)
  gates = {
    name: jnp.where(valid.reshape(len(valid), 1, -1, *[1] * (gate.ndim - 3)), gate, 1)
    for name, gate in tokens.gates.items()
  }
  return tokens._replace(documents=documents_lib.Documents(one, one, valid[:, None]), gates=gates)


def _of_rows(tree, index: jax.Array):
  """Leaves [n, b, ...] to [b, ...]: of row b, number index[b]."""
  return jax.tree.map(lambda x: x[index, jnp.arange(len(index))], tree)


def _where(rows: jax.Array, a, b):
  """The tree a in these rows [b] bool, else b."""
  return jax.tree.map(lambda x, y: jnp.where(_rows(rows, x.ndim), x, y), a, b)


def _rows(x: jax.Array, ndim: int) -> jax.Array:
  """x [b] as an array of so many axes."""
  return x.reshape(-1, *[1] * (ndim - 1))
