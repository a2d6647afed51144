"""Continues prompts: a batch of requests is prefilled at once, then decoded in one compiled loop."""

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
from mc_jax.parallel import axes

NOTHING = -1  # in place of a token


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt and how to continue it.

  Attributes:
    prompt: int [tokens], at least one token, or none if it continues a cached prompt.
    max_tokens: The largest number of tokens in the continuation.
    temperature: See `sampling.Sampling`.
    top_k: See `sampling.Sampling`.
    top_p: See `sampling.Sampling`.
    seed: See `sampling.Sampling`.
    stop: Sequences of tokens that end the continuation, which includes them.
  """

  prompt: np.ndarray
  max_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  stop: tuple[tuple[int, ...], ...] = ()

  def problems(self, vocab_size: int) -> list[str]:
    """Every invalid value, one line each."""
    problems = []
    if self.max_tokens < 1:
      problems.append(f"max_tokens must be at least 1, got {self.max_tokens}")
    if not 0 <= self.temperature < float("inf"):
      problems.append(f"temperature must be 0 (the likeliest token) or more, got {self.temperature}")
    if self.top_k < 0:
      problems.append(f"top_k must be at least 1, or 0 for all tokens, got {self.top_k}")
    if not 0 < self.top_p <= 1:
      problems.append(f"top_p must be above 0 and at most 1, got {self.top_p}")
    if not 0 <= self.seed < 2**32:
      problems.append(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
    if any(not sequence for sequence in self.stop):
      problems.append("stop must not hold an empty sequence")
    if any(not 0 <= token < vocab_size for sequence in self.stop for token in sequence):
      problems.append(f"stop must hold ids from 0 to {vocab_size - 1}, got {self.stop}")
    return problems


class Batch(NamedTuple):
  """Requests as arrays: limits [b]; stop [b, sequences, tokens], right-aligned, where NOTHING matches any token."""

  sampling: Sampling
  limits: jax.Array
  stop: jax.Array


class Progress(NamedTuple):
  """The state of a batch's continuations.

  Attributes:
    cache: The cache of all tokens except the newest.
    token: [b] int32, the newest token, which the model has not yet read.
    count: [b] int32, the number of tokens in the continuation.
    done: [b] bool.
    recent: [b, tokens] int32, the newest tokens, as many as the longest stop sequence has.
  """

  cache: Cache
  token: jax.Array
  count: jax.Array
  done: jax.Array
  recent: jax.Array


@dataclasses.dataclass(frozen=True)
class Decoder:
  """A model that reads prompts and continues them.

  Attributes:
    config: The model's configuration.
    graph: The model's graph, without its parameters.
    params: Nested dict of arrays, as `nnx.state(model)`.
    cache: The configuration of caches.
    mesh: The parameters' mesh; None: no mesh.

  Raises:
    ConfigError: A cache configuration that does not suit the model.
  """

  config: ModelConfig
  graph: nnx.GraphDef
  params: dict
  cache: CacheConfig
  mesh: jax.sharding.Mesh | None = None

  def __post_init__(self):
    problems = self.cache.problems(self.config)
    if self.mesh is not None and self.mesh.shape["context"] > 1:
      problems.append(f"mesh.context={self.mesh.shape['context']} must be 1 for generation: a token is on one device")
    if problems:
      raise ConfigError("\n".join(problems))

  @property
  def rows(self) -> int:
    """The number of rows of a batch is a multiple of this."""
    return 1 if self.mesh is None else axes.shards("batch", self.mesh.shape)

  def prefill(self, prompts: Sequence[np.ndarray]) -> tuple[jax.Array, Cache]:
    """Reads prompts, int [tokens] each; returns the logits after each, [b, vocab_size], and the cache.

    If the batch does not divide evenly among the mesh's devices, copies of the first prompt fill it up.

    Raises:
      ConfigError: An empty prompt, an id that the model does not have, or more tokens than the cache has room for.
    """
    self._check(prompts, np.zeros(len(prompts), int), least=1)
    tokens, lengths = _padded(_filled(prompts, len(prompts) + -len(prompts) % self.rows), self.cache.tokens)
    with self._context():
      return _prefill(self.graph, self.params, tokens, lengths, self.cache)

  def shapes(self, rows: int) -> tuple[jax.ShapeDtypeStruct, Cache]:
    """The shapes of `prefill`'s results for a number of prompts."""

    def empty():
      logits = jnp.zeros((rows, self.config.vocab_size), jnp.float32)
      return logits, nnx.merge(self.graph, self.params).init_cache(self.cache, rows)

    with self._context():
      return jax.eval_shape(empty)

  def extend(self, cache: Cache, prompts: Sequence[np.ndarray], logits: jax.Array) -> tuple[jax.Array, Cache]:
    """Reads more tokens of each sequence, one by one; the cache is donated.

    Args:
      cache: The cache of the tokens so far.
      prompts: int [tokens] each, possibly empty. Rows without a prompt read copies of the first one.
      logits: [b, vocab_size], the logits after the tokens so far, which sequences without new tokens keep.

    Raises:
      ConfigError: As `prefill`; more prompts than rows; a cache that has been donated before.
    """
    self._check(prompts, _positions(logits, cache, len(prompts)), least=0)
    tokens, lengths = _padded(_filled(prompts, len(logits)), self.cache.tokens)
    with self._context():
      return _extend(self.graph, self.params, tokens, lengths, cache, logits, self.cache)

  def generate(
    self, requests: Sequence[Request], start: tuple[jax.Array, Cache] | None = None, *, block: int = 16
  ) -> Iterator[np.ndarray]:
    """Continues the requests. Errors are raised at once; new tokens are yielded as they are generated.

    Args:
      requests: A batch of requests.
      start: (logits, cache) from `prefill` or a saved prompt, which the prompts continue and which is donated; None:
        the prompts are the beginning.
      block: The number of tokens to generate before they are yielded.

    Yields:
      int32 [requests, up to block], NOTHING after the end of a continuation.

    Raises:
      ConfigError: As `prefill`; a request's values; a continuation that the cache has no room for.
    """
    self.check(requests, start)
    if block < 1:
      raise ConfigError(f"block must be at least 1 token, got {block}")
    prompts = [request.prompt for request in requests]
    if start is None:
      start = self.prefill(prompts)
    elif any(len(prompt) for prompt in prompts):
      start = self.extend(start[1], prompts, start[0])
    return self._blocks(requests, *start, block)

  def check(self, requests: Sequence[Request], start: tuple[jax.Array, Cache] | None = None) -> None:
    """Raises the ConfigError that `generate` would raise."""
    problems = [
      f"request {i}: {problem}" for i, r in enumerate(requests) for problem in r.problems(self.config.vocab_size)
    ]
    if problems:
      raise ConfigError("\n".join(problems))
    before = np.zeros(len(requests), int) if start is None else _positions(*start, len(requests))
    prompts = [request.prompt for request in requests]
    self._check(prompts, before, least=start is None, room=[request.max_tokens for request in requests])

  def _blocks(self, requests: Sequence[Request], logits: jax.Array, cache: Cache, block: int) -> Iterator[np.ndarray]:
    """The tokens that `generate` yields, after the prompts were read."""
    count, batch = len(requests), _batch(_filled(requests, len(logits)), self.config.vocab_size)
    with self._context():
      progress, tokens = _begin(batch, logits, cache)
    tokens = [np.asarray(tokens)[:, None]]
    while True:
      done = bool(progress.done.all())
      if done or sum(x.shape[1] for x in tokens) >= block:
        yield np.concatenate(tokens, axis=1)[:count]
        tokens = []
      if done:
        return
      steps = block - sum(x.shape[1] for x in tokens)
      with self._context():
        progress, new = _continue(self.graph, self.params, batch, progress, np.int32(steps), self.cache, block)
      tokens.append(np.asarray(new)[:, :steps])

  def _context(self) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

  def _check(self, prompts, before, *, least: int, room: Sequence[int] = ()) -> None:
    """Raises ConfigError for tokens that cannot be read after `before` [b] others, with `room` more to come."""
    problems = [] if len(prompts) else ["there is no prompt: a batch has at least one"]
    for i, prompt in enumerate(prompts):
      prompt = np.asarray(prompt)
      if prompt.ndim != 1 or (prompt.size and not np.issubdtype(prompt.dtype, np.integer)):
        problems.append(f"prompt {i} must be integers [tokens], got {prompt.dtype} {prompt.shape}")
        continue
      if len(prompt) < least:
        problems.append(f"prompt {i} is empty: it must have at least one token")
      outside = prompt[(prompt < 0) | (prompt >= self.config.vocab_size)]
      if outside.size:
        problems.append(f"prompt {i} has the id {outside[0]}: ids must be from 0 to {self.config.vocab_size - 1}")
      total, more = int(before[i]) + len(prompt), room[i] if room else 0
      # What drops its oldest states has no end; keys and values, which are all kept, do.
      endless = self.cache.full == "drop_oldest" and all(kind.endless for kind in self.config.mixers)
      if total + more > self.cache.tokens and not endless:
        problems.append(
          f"prompt {i}: {total:,} tokens and {more:,} to come are more than the {self.cache.tokens:,} that the cache "
          "is for (cache.tokens)"
        )
    if problems:
      raise ConfigError("\n".join(problems))


def _filled(items: Sequence, count: int) -> list:
  """The items, followed by copies of the first up to `count`."""
  return [*items, *[items[0]] * (count - len(items))]


def _positions(logits: jax.Array, cache: Cache, count: int) -> np.ndarray:
  """The number of tokens so far in the first `count` rows of a cache.

  Raises:
    ConfigError: There are fewer rows, or the cache has been donated.
  """
  if any(leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
    raise ConfigError("this cache was given away to an earlier continuation: prefill or load the prompt again")
  if count > len(logits):
    raise ConfigError(f"{count} prompts are more than the {len(logits)} rows of the cache that they continue")
  return np.asarray(cache.position)[:count]


def _padded(prompts: Sequence[np.ndarray], room: int) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [b, length] int32 and lengths [b] int32. Few values of length, up to `room`: each compiles a program."""
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  longest = max(int(lengths.max()), 1)
  unit = max(16, (1 << (longest - 1).bit_length()) // 8)
  tokens = np.zeros((len(prompts), min(-(-longest // unit) * unit, max(longest, room))), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  return tokens, lengths


def _batch(requests: Sequence[Request], vocab_size: int) -> Batch:
  def each(field, dtype):
    return np.array([getattr(request, field) for request in requests], dtype)

  requests = [dataclasses.replace(request, top_k=min(request.top_k, vocab_size)) for request in requests]
  sampling = Sampling(*(each(f, d) for f, d in zip(Sampling._fields, "fifI", strict=True)))
  # These numbers are shapes, each of which compiles a program: round them up to powers of two.
  sequences = _power_of_two(max(len(request.stop) for request in requests))
  longest = _power_of_two(max((len(sequence) for request in requests for sequence in request.stop), default=1))
  stop = np.full((len(requests), sequences, longest), NOTHING, np.int32)
  for row, request in zip(stop, requests, strict=True):
    for padded, sequence in zip(row, request.stop, strict=False):
      padded[longest - len(sequence) :] = sequence
  return Batch(sampling, each("max_tokens", np.int32), stop)


def _power_of_two(n: int) -> int:
  """The next power of two; 0 for 0."""
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
def _begin(requests, logits, cache):
  rows = len(logits)
  zeros = jnp.zeros(rows, jnp.int32)
  recent = jnp.full((rows, requests.stop.shape[-1]), NOTHING, jnp.int32)
  progress = _append(requests, Progress(cache, zeros, zeros, jnp.zeros(rows, bool), recent), logits)
  return progress, progress.token


@functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=3)
def _continue(graph, params, requests, progress, steps, config, block):
  """Generates up to `steps` tokens, until all are done: [b, block] int32, NOTHING where there is no token."""
  model = nnx.merge(graph, params)

  def body(carry):
    i, progress, out = carry
    active = ~progress.done
    logits, cache = model.step(progress.token, progress.cache, config, active)
    progress = _append(requests, progress._replace(cache=cache), logits)
    return i + 1, progress, out.at[:, i].set(jnp.where(active, progress.token, NOTHING))

  def unfinished(carry):
    return (carry[0] < steps) & ~carry[1].done.all()

  out = jnp.full((len(progress.token), block), NOTHING, jnp.int32)
  _, progress, out = jax.lax.while_loop(unfinished, body, (0, progress, out))
  return progress, out


def _append(requests: Batch, progress: Progress, logits: jax.Array) -> Progress:
  """Appends a token to the continuations that are not done."""
  token = jnp.where(progress.done, progress.token, draw(logits, requests.sampling, progress.count))
  count = progress.count + ~progress.done
  recent = jnp.concatenate([progress.recent[:, 1:], token[:, None]], axis=1)
  alike = (recent[:, None] == requests.stop) | (requests.stop == NOTHING)
  stopped = (alike.all(-1) & (requests.stop != NOTHING).any(-1)).any(-1)
  return Progress(progress.cache, token, count, progress.done | stopped | (count >= requests.limits), recent)


def repeat(logits: jax.Array, cache: Cache, times: int) -> tuple[jax.Array, Cache]:
  """Repeats the results of `prefill` for several continuations of a prompt."""
  return jnp.repeat(logits, times, axis=0), cache_lib.repeat(cache, times)


class Stopwatch:
  """Times its block: `compilation` is the time in which JAX traces and compiles, `seconds` the rest."""

  def __enter__(self) -> Stopwatch:
    self._spans: list[tuple[float, float]] = []
    self._begin = time.monotonic()
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *_) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)
    self.compilation, until = 0.0, self._begin
    for start, end in sorted(self._spans):  # nested traces count once
      self.compilation += max(end - max(start, until), 0.0)
      until = max(until, end)
    self.seconds = time.monotonic() - self._begin - self.compilation

  def _listen(self, event: str, seconds: float, **_) -> None:
    if event.startswith("/jax/core/compile/"):
      now = time.monotonic()
      self._spans.append((now - seconds, now))
