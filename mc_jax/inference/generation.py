"""Continuing prompts: a batch of requests, prefilled at once, then token by token in one compiled loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_jax.errors import ConfigError
from mc_jax.inference.sampling import Sampling, draw
from mc_jax.models import Cache, CacheConfig, ModelConfig
from mc_jax.models import cache as cache_lib

NOTHING = -1  # in place of a token


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt and how it is continued.

  Attributes:
    prompt: int [tokens], at least one (or none, after a prompt that is cached already).
    max_tokens: of the continuation.
    temperature, top_k, top_p, seed: see `sampling.Sampling`.
    stop: sequences of tokens after which the continuation ends; they are its last tokens.
  """

  prompt: np.ndarray
  max_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  stop: tuple[tuple[int, ...], ...] = ()

  def problems(self, vocab_size: int) -> list[str]:
    """Every value that cannot be, one line each."""
    found = []
    if self.max_tokens < 1:
      found.append(f"max_tokens must be at least 1, got {self.max_tokens}")
    if not 0 <= self.temperature < float("inf"):
      found.append(f"temperature must be 0 (the likeliest token) or more, got {self.temperature}")
    if self.top_k < 0:
      found.append(f"top_k must be at least 1, or 0 for all tokens, got {self.top_k}")
    if not 0 < self.top_p <= 1:
      found.append(f"top_p must be above 0 and at most 1, got {self.top_p}")
    if not 0 <= self.seed < 2**32:
      found.append(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
    if any(not sequence for sequence in self.stop):
      found.append("stop must not hold an empty sequence")
    if any(not 0 <= token < vocab_size for sequence in self.stop for token in sequence):
      found.append(f"stop must hold ids from 0 to {vocab_size - 1}, got {self.stop}")
    return found


class Asked(NamedTuple):
  """The requests as arrays: sampling, limits [b] int32, stop [b, sequences, tokens] int32 right-aligned, -1 is any."""

  sampling: Sampling
  limits: jax.Array
  stop: jax.Array


class Going(NamedTuple):
  """Where the continuations are.

  Attributes:
    cache: of all tokens but the newest.
    token: [b] int32, the newest, which the model has not yet read.
    made: [b] int32, tokens of the continuation.
    done: [b] bool.
    recent: [b, tokens] int32, the last ones made, as many as the longest stop sequence has.
  """

  cache: Cache
  token: jax.Array
  made: jax.Array
  done: jax.Array
  recent: jax.Array


@dataclasses.dataclass(frozen=True)
class Decoder:
  """A model that reads prompts and continues them.

  Attributes:
    config: of the model.
    graph: of the model, without its parameters.
    params: nested dict of arrays, as `nnx.state(model)`.
    cache: what caches are made for.
    mesh: that the parameters lie on; None: no mesh.

  Raises:
    ConfigError: a cache that cannot be.
  """

  config: ModelConfig
  graph: nnx.GraphDef
  params: dict
  cache: CacheConfig
  mesh: jax.sharding.Mesh | None = None

  def __post_init__(self):
    found = self.cache.problems(self.config)
    if self.mesh is not None and self.mesh.shape["context"] > 1:
      found.append(f"mesh.context={self.mesh.shape['context']} must be 1 for generation: a token is on one device")
    if found:
      raise ConfigError("\n".join(found))

  @property
  def rows(self) -> int:
    """A batch has a multiple of so many rows."""
    return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

  def prefill(self, prompts: Sequence[np.ndarray]) -> tuple[jax.Array, Cache]:
    """Reads prompts, each int [tokens]; logits of what follows each [b, vocab_size], and their cache.

    On a mesh whose devices the batch does not fill evenly, the first prompt is read more often, in rows at the end.

    Raises:
      ConfigError: an empty prompt, an id that the model does not have, more tokens than the cache is for.
    """
    self._check(prompts, np.zeros(len(prompts), int), least=1)
    tokens, lengths = _padded(_filled(prompts, len(prompts) + -len(prompts) % self.rows), self.cache.tokens)
    with self._context():
      return _prefill(self.graph, self.params, tokens, lengths, self.cache)

  def shapes(self, rows: int) -> tuple[jax.ShapeDtypeStruct, Cache]:
    """The shapes of what `prefill` gives for so many prompts."""

    def empty():
      logits = jnp.zeros((rows, self.config.vocab_size), jnp.float32)
      return logits, nnx.merge(self.graph, self.params).init_cache(self.cache, rows)

    with self._context():
      return jax.eval_shape(empty)

  def extend(self, cache: Cache, prompts: Sequence[np.ndarray], logits: jax.Array) -> tuple[jax.Array, Cache]:
    """Reads more tokens of each sequence, one by one; the cache is given away.

    Args:
      cache: of the tokens so far.
      prompts: int [tokens] each, possibly none. If there are fewer than rows, the others read the first.
      logits: [b, vocab_size], of what follows the tokens so far: what a sequence without new tokens keeps.

    Raises:
      ConfigError: as `prefill`; more prompts than rows; a cache that was given away before.
    """
    self._check(prompts, _positions(logits, cache, len(prompts)), least=0)
    tokens, lengths = _padded(_filled(prompts, len(logits)), self.cache.tokens)
    with self._context():
      return _extend(self.graph, self.params, tokens, lengths, cache, logits, self.cache)

  def generate(
    self, requests: Sequence[Request], start: tuple[jax.Array, Cache] | None = None, *, block: int = 16
  ) -> Iterator[np.ndarray]:
    """Continues the requests; what is wrong is told at once, the new tokens are yielded as they come.

    Args:
      requests: a batch.
      start: (logits, cache) of `prefill` or a saved one, which the prompts go on from and which is given away; None:
        the prompts are the beginning.
      block: tokens that are made before they are yielded.

    Yields:
      int32 [requests, up to block], NOTHING where a continuation has ended.

    Raises:
      ConfigError: as `prefill`; a request's values; a continuation that the cache is too short for.
    """
    self.check(requests, start)
    if block < 1:
      raise ConfigError(f"block must be at least 1 token, got {block}")
    prompts = [request.prompt for request in requests]
    if start is None:
      start = self.prefill(prompts)
    elif any(len(prompt) for prompt in prompts):
      start = self.extend(start[1], prompts, start[0])
    return self._made(requests, *start, block)

  def check(self, requests: Sequence[Request], start: tuple[jax.Array, Cache] | None = None) -> None:
    """Raises the ConfigError that `generate` would raise."""
    found = [
      f"request {i}: {problem}" for i, r in enumerate(requests) for problem in r.problems(self.config.vocab_size)
    ]
    if found:
      raise ConfigError("\n".join(found))
    before = np.zeros(len(requests), int) if start is None else _positions(*start, len(requests))
    prompts = [request.prompt for request in requests]
    self._check(prompts, before, least=start is None, room=[request.max_tokens for request in requests])

  def _made(self, requests: Sequence[Request], logits: jax.Array, cache: Cache, block: int) -> Iterator[np.ndarray]:
    """`generate`, after the prompts."""
    count, asked = len(requests), _arrays(_filled(requests, len(logits)), self.config.vocab_size)
    with self._context():
      going, tokens = _begin(asked, logits, cache)
    tokens = [np.asarray(tokens)[:, None]]
    while True:
      done = bool(going.done.all())
      if done or sum(part.shape[1] for part in tokens) >= block:
        yield np.concatenate(tokens, axis=1)[:count]
        tokens = []
      if done:
        return
      steps = block - sum(part.shape[1] for part in tokens)
      with self._context():
        going, made = _continue(self.graph, self.params, asked, going, np.int32(steps), self.cache, block)
      tokens.append(np.asarray(made)[:, :steps])

  def _context(self) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

  def _check(self, prompts, before, *, least: int, room: Sequence[int] = ()) -> None:
    """Raises ConfigError for tokens that cannot be read after `before` [b] others, with `room` more to come."""
    found = [] if len(prompts) else ["there is no prompt: a batch has at least one"]
    for i, prompt in enumerate(prompts):
      prompt = np.asarray(prompt)
      if prompt.ndim != 1 or (prompt.size and not np.issubdtype(prompt.dtype, np.integer)):
        found.append(f"prompt {i} must be integers [tokens], got {prompt.dtype} {prompt.shape}")
        continue
      if len(prompt) < least:
        found.append(f"prompt {i} is empty: it must have at least one token")
      outside = prompt[(prompt < 0) | (prompt >= self.config.vocab_size)]
      if outside.size:
        found.append(f"prompt {i} has the id {outside[0]}: ids must be from 0 to {self.config.vocab_size - 1}")
      total, more = int(before[i]) + len(prompt), room[i] if room else 0
      # What drops its oldest states has no end; keys and values, which are all kept, do.
      endless = self.cache.full == "drop_oldest" and all(kind.endless for kind in self.config.mixers)
      if total + more > self.cache.tokens and not endless:
        found.append(
          f"prompt {i}: {total:,} tokens and {more:,} to come are more than the {self.cache.tokens:,} that the cache "
          "is for (cache.tokens)"
        )
    if found:
      raise ConfigError("\n".join(found))


def _filled(items: Sequence, count: int) -> list:
  """So many items: the first again and again at the end."""
  return [*items, *[items[0]] * (count - len(items))]


def _positions(logits: jax.Array, cache: Cache, count: int) -> np.ndarray:
  """Tokens so far in the first `count` rows of a cache.

  Raises:
    ConfigError: there are fewer rows, or the cache's memory is another's now.
  """
  if any(leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
    raise ConfigError("this cache was given away to an earlier continuation: prefill or load the prompt again")
  if count > len(logits):
    raise ConfigError(f"{count} prompts are more than the {len(logits)} rows of the cache that they go on from")
  return np.asarray(cache.position)[:count]


def _padded(prompts: Sequence[np.ndarray], room: int) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [b, length] int32 and lengths [b] int32; few lengths, because each compiles a program, within `room`."""
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  longest = max(int(lengths.max()), 1)
  unit = max(16, (1 << (longest - 1).bit_length()) // 8)
  tokens = np.zeros((len(prompts), min(-(-longest // unit) * unit, max(longest, room))), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  return tokens, lengths


def _arrays(requests: Sequence[Request], vocab_size: int) -> Asked:
  def each(field, dtype):
    return np.array([getattr(request, field) for request in requests], dtype)

  requests = [dataclasses.replace(request, top_k=min(request.top_k, vocab_size)) for request in requests]
  sampling = Sampling(*(each(f, d) for f, d in zip(Sampling._fields, "fifI", strict=True)))
  # Their numbers are shapes, each of which compiles a program: rounded up to powers of two.
  sequences = _power_of_two(max(len(request.stop) for request in requests))
  longest = _power_of_two(max((len(sequence) for request in requests for sequence in request.stop), default=1))
  stop = np.full((len(requests), sequences, longest), NOTHING, np.int32)
  for row, request in zip(stop, requests, strict=True):
    for place, sequence in zip(row, request.stop, strict=False):
      place[longest - len(sequence) :] = sequence
  return Asked(sampling, each("max_tokens", np.int32), stop)


def _power_of_two(n: int) -> int:
  """The next one."""
  return 1 << (n - 1).bit_length() if n else 0


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(graph, params, tokens, lengths, config):
  return nnx.merge(graph, params).prefill(tokens, config, lengths)


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=4)
def _extend(graph, params, tokens, lengths, cache, logits, config):
  model = nnx.merge(graph, params)

  def body(i, carry):
    logits, cache = carry
    active = i < lengths
    new, cache = model.step(jax.lax.dynamic_index_in_dim(tokens, i, 1, keepdims=False), cache, config, active)
    return jnp.where(active[:, None], new, logits), cache

  return jax.lax.fori_loop(0, lengths.max(), body, (logits, cache))


@functools.partial(jax.jit, donate_argnums=2)
def _begin(asked, logits, cache):
  rows = len(logits)
  zeros = jnp.zeros(rows, jnp.int32)
  recent = jnp.full((rows, asked.stop.shape[-1]), NOTHING, jnp.int32)
  going = _made(asked, Going(cache, zeros, zeros, jnp.zeros(rows, bool), recent), logits)
  return going, going.token


@functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=3)
def _continue(graph, params, asked, going, steps, config, block):
  """Up to `steps` more tokens, until all are done; [b, block] int32, NOTHING where there is none."""
  model = nnx.merge(graph, params)

  def body(carry):
    i, going, out = carry
    active = ~going.done
    logits, cache = model.step(going.token, going.cache, config, active)
    going = _made(asked, going._replace(cache=cache), logits)
    return i + 1, going, out.at[:, i].set(jnp.where(active, going.token, NOTHING))

  def goes_on(carry):
    return (carry[0] < steps) & ~carry[1].done.all()

  out = jnp.full((len(going.token), block), NOTHING, jnp.int32)
  _, going, out = jax.lax.while_loop(goes_on, body, (0, going, out))
  return going, out


def _made(asked: Asked, going: Going, logits: jax.Array) -> Going:
  """One more token of the continuations that are not done."""
  token = jnp.where(going.done, going.token, draw(logits, asked.sampling, going.made))
  made = going.made + ~going.done
  recent = jnp.concatenate([going.recent[:, 1:], token[:, None]], axis=1)
  alike = (recent[:, None] == asked.stop) | (asked.stop == NOTHING)
  stopped = (alike.all(-1) & (asked.stop != NOTHING).any(-1)).any(-1)
  return Going(going.cache, token, made, going.done | stopped | (made >= asked.limits), recent)


def repeat(logits: jax.Array, cache: Cache, times: int) -> tuple[jax.Array, Cache]:
  """What `prefill` gave for a prompt, for so many continuations of it."""
  return jnp.repeat(logits, times, axis=0), cache_lib.repeat(cache, times)


class Stopwatch:
  """Seconds inside a `with`: `seconds` without those in which JAX traced and compiled, which are `compilation`."""

  def __enter__(self) -> Stopwatch:
    self._spans: list[tuple[float, float]] = []
    self._begin = time.monotonic()
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *_) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)
    self.compilation, until = 0.0, self._begin
    for start, end in sorted(self._spans):  # what is traced inside another trace is not counted twice
      self.compilation += max(end - max(start, until), 0.0)
      until = max(until, end)
    self.seconds = time.monotonic() - self._begin - self.compilation

  def _listen(self, event: str, seconds: float, **_) -> None:
    if event.startswith("/jax/core/compile/"):
      now = time.monotonic()
      self._spans.append((now - seconds, now))


def cache_bytes(cache: Cache) -> int:
  """Bytes of a cache's slots: the cached states and summaries, or the keys and values."""
  return cache_lib.nbytes(cache.slots)
