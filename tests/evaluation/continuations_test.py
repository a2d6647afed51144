"""Continuations against the plain forward pass: their likelihoods, and what the model writes itself."""

import dataclasses

import chex
import jax
import numpy as np
import plain
import pytest
from flax import nnx
from marks import slow

from mc_jax.data import tokenizers
from mc_jax.evaluation import Subject, continuations
from mc_jax.evaluation.continuations import Pair
from mc_jax.inference import Request
from mc_jax.models import LanguageModel, MemoryConfig
from mc_jax.parallel import mesh as meshes
from mc_jax.parallel.mesh import MeshConfig

GRM = dict(memory=MemoryConfig(rule="linear", chunk=4, segment_length=8))


@pytest.fixture(scope="module")
def untrained(tiny, alone):
  """Makes a Subject that never saw anything, with logits far enough apart that the likeliest token is in no doubt."""

  def make(**fields):
    config = tiny(**fields)
    graph, params = nnx.split(LanguageModel(config.model, nnx.Rngs(0)))
    params["embedding"].set_value(params["embedding"][...] * 4)
    return Subject(graph, nnx.to_pure_dict(params), 256, config.data, alone)

  return make


@pytest.fixture(scope="module")
def subject(untrained):
  return untrained(**GRM)


def _pairs(*lengths):
  """Pairs of such (context, continuation) lengths; contexts of one length are the same."""
  draw = np.random.default_rng(0)
  contexts = {length: draw.integers(1, 256, length).astype(np.int32) for length, _ in lengths}
  return [Pair(contexts[length], draw.integers(1, 256, more).astype(np.int32)) for length, more in lengths]


MIXED = [(3, 5), (20, 2), (1, 1), (20, 3), (9, 1), (9, 1), (20, 2), (5, 0), (40, 9)]


@pytest.mark.parametrize(
  ("fields", "step"),
  [
    slow(GRM, 0, id="grm-steps"),
    slow(GRM, 10_000, id="grm-forward"),
    pytest.param(dict(pattern="attention"), 0, id="transformer-steps"),
    slow(dict(pattern="attention"), 10_000, id="transformer-forward"),
  ],
)
def test_likelihoods_are_those_of_the_plain_forward_pass(untrained, fields, step, monkeypatch):
  monkeypatch.setattr(continuations, "STEP", step)
  subject, pairs, counts = untrained(**fields), _pairs(*MIXED), []
  found = continuations.likelihoods(subject, pairs, counts.append)
  expected = [plain.likelihood(subject, *pair) for pair in pairs]
  chex.assert_trees_all_close([f.log_probability for f in found], [e for e, _ in expected], rtol=1e-5, atol=1e-4)
  assert [f.greedy for f in found] == [greedy for _, greedy in expected]
  assert sum(counts) == len(pairs) - 1  # of nothing, there is nothing to score


@pytest.mark.parametrize("step", [0, 10_000], ids=["steps", "forward"])
def test_what_the_model_would_write_is_greedy(subject, step, monkeypatch):
  monkeypatch.setattr(continuations, "STEP", step)
  (pair,) = _pairs((20, 3))
  right = np.array(plain.greedy(subject, pair.context, 3), np.int32)
  wrong = np.where([False, False, True], (right + 1) % 256, right).astype(np.int32)
  scores = continuations.likelihoods(subject, [Pair(pair.context, tokens) for tokens in (right, wrong, right[:2])])
  assert [score.greedy for score in scores] == [True, False, True]


def test_a_context_is_read_once_where_that_takes_less(subject):
  single, short, long = (60, 1), (20, 5), (70, 3)
  pairs = _pairs(single, short, long, single, short, long)
  assert continuations._plan(subject, pairs) == ([1, 4], [[0, 3], [2, 5]])
  one_more = _pairs(*[short] * 8)  # saves 7 x 20 tokens, more than 32 for each of 4 steps
  assert continuations._plan(subject, one_more) == ([], [list(range(8))])


def test_what_cannot_be_decoded_is_read_whole(subject, untrained):
  pairs = _pairs((60, 1), (60, 1))
  logarithmic = dataclasses.replace(GRM["memory"], segmentation="logarithmic")
  assert continuations._plan(untrained(memory=logarithmic), pairs) == ([0, 1], [])
  mesh = meshes.make(MeshConfig(context=2), jax.devices()[:2])
  assert continuations._plan(dataclasses.replace(subject, mesh=mesh), pairs) == ([0, 1], [])


@pytest.mark.slow
def test_a_batch_is_spread_over_a_mesh(subject, monkeypatch):
  monkeypatch.setattr(continuations, "STEP", 0)
  pairs = _pairs(*MIXED[:4])
  spread = dataclasses.replace(subject, mesh=meshes.make(MeshConfig(data=2), jax.devices()[:2]))
  found, expected = continuations.likelihoods(spread, pairs), continuations.likelihoods(subject, pairs)
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_a_continuation_ends_before_the_first_text_of_until(subject):
  tokenizer = tokenizers.Bytes()
  prompts = [pair.context for pair in _pairs((5, 1), (9, 1), (12, 1))]
  whole = [tokenizer.decode(np.array(plain.greedy(subject, prompt, 12))) for prompt in prompts]
  until = [[whole[0][8:10], whole[0][4:6]], [], ["", whole[2][:1]]]
  expected = [whole[0][: min(map(whole[0].find, until[0]))], whole[1], ""]
  requests = [Request(prompt, 12, temperature=0.0) for prompt in prompts]
  assert continuations.written(subject, tokenizer, requests, until) == expected
  assert len(expected[0]) < len(whole[0])


def test_shapes_are_few():
  assert [continuations.bucket(n) for n in (1, 16, 17, 25, 33, 49, 1025)] == [16, 16, 24, 32, 48, 64, 1536]
  assert len({continuations.bucket(n) for n in range(1, 4097)}) == 17
