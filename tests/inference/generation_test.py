"""Generation against full forward passes, and what it refuses."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from mc_jax.errors import ConfigError
from mc_jax.inference import NOTHING, Decoder, Request
from mc_jax.models import CacheConfig, LanguageModel, MemoryConfig, ModelConfig
from mc_jax.parallel import mesh as meshes
from mc_jax.parallel.mesh import MeshConfig

CONFIG = ModelConfig(
  vocab_size=16,
  layers=1,
  d_model=16,
  heads=2,
  mlp_dim=16,
  memory=MemoryConfig(rule="linear", aggregation="grm", chunk=2, segment_length=4),
)
CACHE = CacheConfig(tokens=40)


@functools.cache
def decoder(cache=CACHE, config=CONFIG, mesh=None):
  graph, params = nnx.split(LanguageModel(config, nnx.Rngs(0)))
  # Larger, so that the likeliest token is not always the one just read.
  params = jax.tree.map(lambda x: 3 * x, nnx.to_pure_dict(params))
  return Decoder(config, graph, params, cache, mesh)


def prompts(*lengths):
  rng = np.random.default_rng(0)
  return [rng.integers(0, CONFIG.vocab_size, length) for length in lengths]


def texts(decoder, requests, **options):
  """Each continuation as a list of tokens."""
  blocks = list(decoder.generate(requests, **options))
  rows = np.concatenate(blocks, axis=1)
  return [[int(token) for token in row if token != NOTHING] for row in rows]


def by_forward_passes(decoder, prompt, tokens):
  """The likeliest continuation, by a forward pass for each token."""
  forward = jax.jit(lambda params, x: nnx.merge(decoder.graph, params)(x))
  row = np.zeros((1, CACHE.tokens), np.int32)
  row[0, : len(prompt)] = prompt
  made = []
  for at in range(len(prompt), len(prompt) + tokens):
    made.append(int(np.argmax(forward(decoder.params, row)[0, at - 1])))
    row[0, at] = made[-1]
  return made


def test_the_likeliest_tokens_are_those_of_forward_passes():
  requests = [Request(prompt, 12, temperature=0) for prompt in prompts(3, 9, 1)]
  found = texts(decoder(), requests, block=5)
  assert found == [by_forward_passes(decoder(), request.prompt, 12) for request in requests]
  assert len(set(map(tuple, found))) == 3


@pytest.mark.slow
def test_a_request_does_not_depend_on_the_batch():
  requests = [Request(prompt, 10 + i, seed=i, top_k=3 * i) for i, prompt in enumerate(prompts(3, 9, 6))]
  together = texts(decoder(), requests)
  assert [len(text) for text in together] == [10, 11, 12]
  assert [texts(decoder(), [request])[0] for request in requests] == together
  assert texts(decoder(), [Request(requests[0].prompt, 10, seed=7)])[0] != together[0]


@pytest.mark.slow
def test_a_continuation_ends_with_its_stop_sequence():
  (prompt,) = prompts(5)
  whole = texts(decoder(), [Request(prompt, 20, seed=1)])[0]
  stop = tuple(whole[8:10])
  first = next(i for i in range(2, 21) if tuple(whole[i - 2 : i]) == stop)
  never = (CONFIG.vocab_size - 1,) * 5
  stopped, other = texts(decoder(), [Request(prompt, 20, seed=1, stop=(never, stop)), Request(prompt, 20, seed=1)])
  assert stopped == whole[:first]
  assert other == whole


def test_a_prompt_can_come_in_parts():
  (prompt,) = prompts(11)
  expected = texts(decoder(), [Request(prompt, 9, seed=3)])
  start = decoder().prefill([prompt[:6]])
  assert texts(decoder(), [Request(prompt[6:], 9, seed=3)], start=start) == expected
  start = decoder().prefill([prompt])
  assert texts(decoder(), [Request(prompt[:0], 9, seed=3)], start=start) == expected


@pytest.mark.slow
def test_on_a_mesh():
  requests = [Request(prompt, 12, temperature=0) for prompt in prompts(3, 9, 1)]
  mesh = meshes.make(MeshConfig(data=2, model=2), jax.devices()[:4])
  assert texts(decoder(mesh=mesh), requests) == texts(decoder(), requests)


@pytest.mark.slow
def test_the_oldest_states_are_dropped_on_request():
  (prompt,) = prompts(9)
  with pytest.raises(ConfigError, match=r"capacity=2 is too small: 40 tokens .* need a capacity of 9 segments, got 2"):
    decoder(CacheConfig(40, capacity=2))
  endless = decoder(CacheConfig(10, capacity=2, full="drop_oldest"))
  assert len(texts(endless, [Request(prompt, 60)])[0]) == 60


@pytest.mark.parametrize(
  ("request_", "message"),
  [
    (Request(np.array([], np.int32), 5), "prompt 0 is empty"),
    (Request(np.array([1, 16]), 5), "prompt 0 has the id 16: ids must be from 0 to 15"),
    (Request(np.array([-1]), 5), "prompt 0 has the id -1"),
    (Request(np.array([0.5]), 5), "prompt 0 must be integers"),
    (Request(np.zeros(30, int), 11), r"30 tokens and 11 to come are more than the 40"),
    (Request(np.zeros(3, int), 0), "max_tokens must be at least 1, got 0"),
    (Request(np.zeros(3, int), 1, temperature=-1.0), "temperature must be 0"),
    (Request(np.zeros(3, int), 1, top_k=-1), "top_k must be"),
    (Request(np.zeros(3, int), 1, top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
    (Request(np.zeros(3, int), 1, seed=-1), "seed must be from 0"),
    (Request(np.zeros(3, int), 1, stop=((),)), "stop must not hold an empty sequence"),
    (Request(np.zeros(3, int), 1, stop=((3, -1),)), "stop must hold ids from 0 to 15"),
  ],
)
def test_what_cannot_be_is_named(request_, message):
  with pytest.raises(ConfigError, match=message):
    decoder().generate([request_])


def test_batches_that_cannot_be_are_named():
  (prompt,) = prompts(3)
  with pytest.raises(ConfigError, match="there is no prompt"):
    decoder().generate([])
  with pytest.raises(ConfigError, match="block must be at least 1 token, got 0"):
    decoder().generate([Request(prompt, 1)], block=0)
  start = decoder().prefill([prompt])
  with pytest.raises(ConfigError, match="2 prompts are more than the 1 rows"):
    decoder().generate([Request(prompt, 1)] * 2, start=start)
  assert texts(decoder(), [Request(prompt, 2, top_k=2**40)], start=start)
  with pytest.raises(ConfigError, match="was given away"):
    decoder().generate([Request(prompt, 1)], start=start)


@pytest.mark.slow
def test_rows_that_nobody_asked_for_do_not_matter():
  first, second = prompts(3, 9)
  start = decoder().prefill([first, second])
  expected = texts(decoder(), [Request(np.concatenate([first, second]), 6)])
  assert texts(decoder(), [Request(second, 6)], start=start) == expected


@pytest.mark.parametrize(
  ("cache", "message"),
  [
    (CacheConfig(0), "cache.tokens=0 must be at least 1"),
    (CacheConfig(8, full="grow"), "cache.full='grow' is not one of error, drop_oldest"),
    (CacheConfig(8, dtype="int4"), "cache.dtype='int4' is not one of float32, bfloat16, int8"),
    (CacheConfig(8, capacity=0), "cache.capacity=0 must be at least 1 segment"),
  ],
)
def test_a_cache_that_cannot_be_is_refused(cache, message):
  with pytest.raises(ConfigError, match=message):
    decoder(cache)


@pytest.mark.slow
def test_scores_by_age_are_had_for_so_many_segments_alone():
  memory = MemoryConfig(rule="linear", aggregation="grm", gate="token", chunk=2, segment_length=4)
  config = ModelConfig(vocab_size=16, layers=1, d_model=16, heads=2, mlp_dim=16, max_length=20, memory=memory)
  short = decoder(CacheConfig(20), config)
  assert len(texts(short, [Request(np.arange(17) % 16, 3)])[0]) == 3  # the padded prompt has no more segments either
  with pytest.raises(ConfigError, match=r"cache.tokens=21 make more segments than model.max_length=20"):
    decoder(CacheConfig(21), config)


def test_segments_that_depend_on_the_length_cannot_be_decoded():
  config = ModelConfig(memory=MemoryConfig(segmentation="logarithmic"))
  with pytest.raises(ConfigError, match="logarithmic' cannot be decoded"):
    Decoder(config, None, {}, CACHE)
