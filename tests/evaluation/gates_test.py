"""What is told of the gates is what the model's own scores make of them, and whose answer it was."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from mc_jax import memory
from mc_jax.data.recall import MQARConfig, NIAHConfig
from mc_jax.errors import ConfigError
from mc_jax.evaluation import Options, Subject, gates, recall, tasks
from mc_jax.models import LanguageModel, MemoryConfig, ModelConfig
from mc_jax.parallel import mesh as meshes
from mc_jax.parallel.mesh import MeshConfig

LENGTH, SEGMENT, PAIRS, ROWS = 32, 8, 8, 5
MQAR = MQARConfig(vocab_size=64, pairs=(PAIRS,))


@pytest.fixture
def subject(tiny, alone):
  """Makes a Subject that never saw anything, with batches of 4 rows of MQAR."""

  def make(**options):
    config = tiny(memory=MemoryConfig(rule="linear", chunk=4, segment_length=SEGMENT, **options))
    data = dataclasses.replace(config.data, source="mqar", paths="", length=LENGTH, mqar=MQAR)
    graph, params = nnx.split(LanguageModel(config.model, nnx.Rngs(0)))
    return Subject(graph, nnx.to_pure_dict(params), 256, data, alone)

  return make


def _by_hand(subject, top_k):
  """{memory that holds the answer: (answers, mean gamma [heads, 1 + caches])}: token by token, in NumPy."""
  model = nnx.merge(subject.graph, subject.params)
  blocks, layers = nnx.split(model.blocks)
  block = nnx.merge(blocks, jax.tree.map(lambda x: x[0], layers))
  project = jax.jit(lambda tokens: block.mixer.project(block.mixer_norm(model.embed(tokens))).tokens[1:4:2])
  found = {}
  (setting,) = recall.mqar(subject, Options(rows=ROWS))
  for batch in setting.batches:
    k, u = (np.asarray(x, np.float64) for x in project(batch["tokens"]))
    for row, at in np.argwhere(batch["weights"]):
      own = at // SEGMENT
      key = int(np.argmax(batch["tokens"][row] == batch["tokens"][row, at])) // SEGMENT
      starts = [own * SEGMENT, *range(0, own * SEGMENT, SEGMENT)]
      ends = [at + 1, *range(SEGMENT, own * SEGMENT + 1, SEGMENT)]
      pools = np.stack([k[row, a:b].mean(0) for a, b in zip(starts, ends, strict=True)])  # [memories, heads, d]
      scores = np.einsum("hd,mhd->hm", u[row, at], pools)
      worst = np.argsort(-scores[:, 1:], axis=1)[:, top_k:] + 1
      np.put_along_axis(scores, worst, -np.inf, axis=1)
      gamma = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
      gamma = np.pad(gamma, ((0, 0), (0, LENGTH // SEGMENT - gamma.shape[1])))
      found.setdefault(0 if key == own else 1 + key, []).append(gamma)
  return {held: (len(gammas), np.mean(gammas, axis=0)) for held, gammas in found.items()}


@pytest.mark.parametrize("options", [dict(aggregation="grm"), dict(aggregation="ssc", top_k=1)], ids=["grm", "ssc"])
def test_gamma_is_averaged_by_the_memory_that_holds_the_answer(subject, options):
  subject = subject(**options)
  (result,) = tasks.run(["gates_mqar"], subject, Options(rows=ROWS))
  expected = _by_hand(subject, options.get("top_k", LENGTH))
  assert result.settings == {"length": LENGTH, "pairs": PAIRS}
  assert [row["memory"] for row in result.reads] == sorted(expected) == [1, 2]
  total = 0
  for row in result.reads:
    count, gamma = expected[row["memory"]]
    assert row["tokens"] == count
    np.testing.assert_allclose(row["gamma"], gamma[None], atol=6e-5)
    total += count * gamma[:, row["memory"]]
  assert result.values["tokens"] == ROWS * PAIRS
  assert result.values["gamma_right"] == pytest.approx(total.mean() / (ROWS * PAIRS), rel=1e-4)
  assert result.values["best_head"] == pytest.approx(total.max() / (ROWS * PAIRS), rel=1e-4)


@pytest.mark.slow
def test_on_a_mesh_it_is_the_same(subject):
  subject = subject(aggregation="ssc", top_k=1)
  spread = dataclasses.replace(subject, mesh=meshes.make(MeshConfig(data=2, context=2, model=2), jax.devices()[:8]))
  results = [list(tasks.run(["gates_mqar"], each, Options(rows=ROWS))) for each in (subject, spread)]
  for alone, together in zip(*results, strict=True):
    assert alone.values == pytest.approx(together.values, rel=1e-5)
    for a, b in zip(alone.reads, together.reads, strict=True):
      np.testing.assert_allclose(a["gamma"], b["gamma"], atol=1.1e-4)  # rounded


def test_answers_stand_where_their_tokens_do(oracle):
  settings = [
    *recall.mqar(oracle(None, length=64, batch_size=4, mqar=MQAR), Options(rows=6)),
    *recall.niah("single_3")(oracle(None, length=512, batch_size=4, niah=NIAHConfig()), Options(rows=6)),
  ]
  for _, data, batches in settings:
    for batch in batches:
      found = gates.places(batch)
      assert ((found >= 0) == (batch["weights"] > 0)).all()
      row, at = np.nonzero(found >= 0)
      assert (batch["tokens"][row, found[row, at]] == batch["targets"][row, at]).all()
      assert (found[row, at] <= at).all()
      segment = memory.segments.index(memory.segments.constant(24).lengths(data.length))
      held = gates.holder(batch, segment)
      assert (held[batch["weights"] == 0] == -1).all()
      assert (held[row, at] == np.where(found[row, at] // 24 == at // 24, 0, 1 + found[row, at] // 24)).all()


@pytest.mark.parametrize(
  ("model", "message"),
  [
    (dict(pattern="attention"), "model.pattern=attention does not have"),
    (dict(memory=MemoryConfig(aggregation="none")), "reads with aggregation=none"),
    (dict(memory=MemoryConfig(aggregation="grm", gate="constant")), "aggregation=grm, gate=constant"),
    (dict(memory=MemoryConfig(aggregation="none", after_training="moving_average")), "gate=uniform"),
  ],
)
def test_models_without_gates_are_told(model, message):
  unsuited = tasks.unsuited(["mqar", "gates_mqar"], ModelConfig(**model))
  assert list(unsuited) == ["gates_mqar"]
  assert message in unsuited["gates_mqar"]


def test_models_with_gates_have_them_looked_at(subject):
  for options in (dict(), dict(aggregation="soup", gate="token"), dict(aggregation="ssc", gate="constant")):
    assert not tasks.unsuited(["mqar", "gates_mqar"], ModelConfig(memory=MemoryConfig(**options)))
  with pytest.raises(ConfigError, match="gates_mqar: it needs gates that depend on the token"):
    next(tasks.run(["gates_mqar"], subject(aggregation="residual"), Options(rows=1)))
