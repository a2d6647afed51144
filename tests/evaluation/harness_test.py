"""lm-evaluation-harness itself, on tasks written here, about a model that knows four facts by heart."""

import dataclasses
import json
import math

import jax
import numpy as np
import optax
import plain
import pytest
import yaml
from flax import nnx

from mc_jax.data import tokenizers
from mc_jax.errors import ConfigError
from mc_jax.evaluation import Options, Subject, continuations, scoring, tasks
from mc_jax.models import LanguageModel, MemoryConfig

pytest.importorskip("lm_eval", reason="needs the extra eval")

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from mc_jax.evaluation import harness

FACTS = {"sky": "blue", "sun": "gold", "sea": "gray", "ink": "dark"}
TEXTS = [f"{thing} is {colour}." for thing, colour in FACTS.items()]
LENGTH = 16


@pytest.fixture(scope="module")
def subject(tiny, alone):
  """Trained until it knows the texts, each a document."""
  config = tiny(d_model=32, length=LENGTH, memory=MemoryConfig(rule="linear", chunk=4, segment_length=8))
  graph, params = nnx.split(LanguageModel(config.model, nnx.Rngs(0)))
  params = nnx.to_pure_dict(params)
  rows = np.zeros((len(TEXTS), LENGTH), np.int32)
  for row, text in zip(rows, TEXTS, strict=True):
    row[1 : 1 + len(text)] = tokenizers.encode(text)  # after a separator, and before others
  optimizer = optax.adam(1e-2)

  def step(_, carry):
    params, moments = carry

    def loss(params):
      return scoring.losses(nnx.merge(graph, params)(rows[:, :-1]), rows[:, 1:]).mean()

    updates, moments = optimizer.update(jax.grad(loss)(params), moments)
    return optax.apply_updates(params, updates), moments

  params, _ = jax.jit(lambda p: jax.lax.fori_loop(0, 150, step, (p, optimizer.init(p))))(params)
  return Subject(graph, params, 256, config.data, alone)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Tasks of the harness, with data beside them; what they ask for about ink is wrong."""
  folder = tmp_path_factory.mktemp("tasks")
  rows = [
    {"thing": thing, "colours": list(FACTS.values()), "colour": colour, "place": place, "text": text}
    for place, ((thing, colour), text) in enumerate(zip(FACTS.items(), TEXTS, strict=True))
  ]
  rows[-1] |= {"colour": "blue", "place": 0}
  (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  data = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(folder / "facts.jsonl")}, "cache_dir": str(folder / "cache")},
    "test_split": "test",
    "metadata": {"version": 1.0},
  }
  asked = {"doc_to_text": "{{thing}} is", "target_delimiter": " "}
  choice = {"output_type": "multiple_choice", "doc_to_choice": "colours", "doc_to_target": "place"}
  answer = {
    "output_type": "generate_until",
    "doc_to_target": "{{colour}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False},
    "filter_list": [{"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
  }
  text = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
  }
  for name, task in {"facts_choice": asked | choice, "facts_answer": asked | answer, "facts_text": text}.items():
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | data | task))
  return str(folder)


def _run(names, subject, folder, **options):
  return list(tasks.run([f"lm_eval:{name}" for name in names], subject, Options(include_path=folder, **options)))


@pytest.mark.parametrize("step", [0, 10_000], ids=["steps", "forward"])
def test_a_choice_is_right_where_the_fact_is_known(subject, folder, step, monkeypatch):
  monkeypatch.setattr(continuations, "STEP", step)
  (result,) = _run(["facts_choice"], subject, folder)
  assert result.task == "facts_choice"
  assert result.settings == {"length": LENGTH, "shots": 0, "version": "1.0"}
  assert (result.values["acc"], result.values["rows"]) == (0.75, 4)
  assert result.values["acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_answers_are_written_up_to_a_stop(subject, folder):
  every, two = [_run(["facts_answer"], subject, folder, limit=limit)[0] for limit in (None, 2)]
  assert (every.values["exact_match/stripped"], every.values["rows"]) == (0.75, 4)
  assert (two.values["exact_match/stripped"], two.values["rows"]) == (1.0, 2)


def test_bits_of_whole_texts(subject, folder):
  whole = [([0], text) for text in map(str.encode, TEXTS)]
  # All have 12 tokens: their last 4 are read after as many as go into a length of 8.
  halves = [part for text in map(str.encode, TEXTS) for part in (([0], text[:8]), (text[3:8], text[8:]))]
  found = _run(["facts_text"], subject, folder, lengths=(LENGTH, 8))
  for result, length, parts in zip(found, (LENGTH, 8), (whole, halves), strict=True):
    nats = -sum(plain.likelihood(subject, list(context), list(text))[0] for context, text in parts)
    bits = nats / math.log(2) / sum(map(len, TEXTS))
    assert result.values["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert result.values["byte_perplexity"] == pytest.approx(2**bits, rel=1e-4)
    assert result.settings["length"] == length


def _asked(*arguments):
  return [Instance("loglikelihood", {}, argument, 0) for argument in arguments]


def test_likelihoods_are_those_of_the_plain_forward_pass(subject):
  model = harness.HarnessModel(subject, LENGTH)
  texts = [("sky is", " blue"), ("sky is", " dark"), ("", "sun"), ("ink ", "is"), ("x" * 40, "yz")]
  found = model.loglikelihood(_asked(*texts), disable_tqdm=True)
  pairs = [(b"\0sky is", b" blue"), (b"\0sky is", b" dark"), (b"\0", b"sun"), (b"\0ink", b" is"), (b"x" * 15, b"yz")]
  expected = [plain.likelihood(subject, list(context), list(text)) for context, text in pairs]
  np.testing.assert_allclose([log_p for log_p, _ in found], [log_p for log_p, _ in expected], rtol=1e-4, atol=1e-4)
  assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
  assert found[0].greedy
  assert not found[1].greedy


def test_sampled_answers_differ(subject):
  model = harness.HarnessModel(subject, 64)
  options = {"until": ["."], "max_gen_toks": 8, "do_sample": True, "temperature": 3.0}
  assert len(set(model.generate_until(_asked(*[("moon", options)] * 4), disable_tqdm=True))) > 1


def test_what_cannot_be_is_said(subject, folder, monkeypatch):
  with pytest.raises(ConfigError, match=r"--lengths=8 must be more than the 8 tokens that the task generates"):
    _run(["facts_answer"], subject, folder, lengths=(8,))
  with pytest.raises(ConfigError, match=r"--lengths=3 is less than the 5 tokens of a continuation"):
    _run(["facts_choice"], subject, folder, lengths=(3,))
  recall = dataclasses.replace(subject, data=dataclasses.replace(subject.data, source="mqar", paths=""))
  with pytest.raises(ConfigError, match=r"data\.source=mqar"):
    harness.HarnessModel(recall, LENGTH)
  monkeypatch.setattr(harness, "_index", lambda path, _: TaskManager(include_path=path, include_defaults=False))
  with pytest.raises(ConfigError, match=r"has no task facts_choise; it has facts_choice, .* lists all 3"):
    _run(["facts_choise"], subject, folder)


def test_the_error_of_a_filtered_metric_is_called_its_error():
  metrics = {"alias": "x", "f1,none": 0.5, "f1_stderr,none": 0.1, "f1,strict": 0.25, "f1_stderr,strict": 0.05}
  assert harness._values(metrics) == {"f1": 0.5, "f1_stderr": 0.1, "f1/strict": 0.25, "f1/strict_stderr": 0.05}
