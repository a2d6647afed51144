"""Runs tasks of EleutherAI's lm-evaluation-harness, with its prompts, data and metrics, on a model of this project.

The extra `eval` installs the harness; this module is imported only if a task of it is requested.
"""

from __future__ import annotations

import difflib
import functools
import numbers
import os
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mc_jax.data import identity, tokenizers
from mc_jax.errors import ConfigError
from mc_jax.evaluation import continuations
from mc_jax.evaluation.continuations import Likelihood, Pair
from mc_jax.evaluation.subject import Options, Result, Subject
from mc_jax.inference import Request

BOOTSTRAPS = 1000  # bootstrap samples for standard errors that have no closed form


class HarnessModel(TemplateLM):
  """A subject with the harness's interface.

  Every document starts with the tokenizer's separator, as in training.

  Args:
    subject: The model and data under evaluation.
    length: The largest number of tokens that the model reads. Longer contexts lose their beginning. Longer texts are
      scored in windows of this length, each after one token of the window before it; the last one has as much context
      as fits.

  Raises:
    ConfigError: The subject's run has no text, or the tokenizer has changed.
  """

  def __init__(self, subject: Subject, length: int):
    super().__init__()
    if not subject.data.has_documents:
      raise ConfigError(
        f"tasks of lm-evaluation-harness are text; data.source={subject.data.source} of this run is none"
      )
    self._subject = subject
    self._tokenizer = tokenizers.load(subject.data.tokenizer, subject.data.separator)
    identity.require_tokenizer(subject.trained, self._tokenizer.fingerprint, subject.data.tokenizer)
    self.max_length = length

  @property
  def eot_token_id(self) -> int:
    """The id at which documents begin and end."""
    return self._tokenizer.separator

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
    """The ids of a text, which begins a document unless add_special_tokens is False."""
    ids = self._tokenizer.encode([string])[0].tolist()
    return ids if add_special_tokens is False else [self.eot_token_id, *ids]

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[Likelihood]:
    pairs = [Pair(_ids(context), _ids(continuation)) for _, context, continuation in requests]
    longest = max((len(pair.continuation) for pair in pairs), default=0)
    if longest > self.max_length:
      raise ConfigError(f"--lengths={self.max_length} is less than the {longest} tokens of a continuation")
    kept = [Pair(self._end(p.context, self.max_length + 1 - len(p.continuation)), p.continuation) for p in pairs]
    self._warn_of_cuts([pair.context for pair in pairs], [pair.context for pair in kept])
    return self._likelihoods(kept, "continuations", disable_tqdm)

  def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
    """log p of each text in nats."""
    pairs, owners = [], []
    for owner, (text,) in enumerate(request.args for request in requests):
      ids = self.tok_encode(text, add_special_tokens=False)
      for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
        pairs.append(Pair(*map(_ids, make_disjoint_window(window))))
        owners.append(owner)
    sums = np.zeros(len(requests))
    np.add.at(sums, owners, [score.log_probability for score in self._likelihoods(pairs, "parts", disable_tqdm)])
    return sums.tolist()

  def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
    """The text that the model writes after each context, up to the first of the texts in `until`."""
    generations, until, prompts = [], [], []
    for i, (context, options) in enumerate(request.args for request in requests):
      options = normalize_gen_kwargs(options)
      limit = options["max_gen_toks"]
      if limit >= self.max_length:
        raise ConfigError(f"--lengths={self.max_length} must be more than the {limit} tokens that the task generates")
      prompts.append(_ids(self.tok_encode(context)))
      generations.append(
        Request(
          self._end(prompts[-1], self.max_length - limit),
          limit,
          temperature=float(options.get("temperature") or 0) if options["do_sample"] else 0.0,
          top_k=int(options.get("top_k") or 0),
          top_p=float(options.get("top_p") or 1),
          seed=i,
        )
      )
      until.append([text for text in options.get("until") or [] if text])
    self._warn_of_cuts(prompts, [request.prompt for request in generations])
    with tqdm(total=len(generations), desc="answers", disable=disable_tqdm or None) as progress:
      return continuations.written(self._subject, self._tokenizer, generations, until, progress.update)

  def _likelihoods(self, pairs: Sequence[Pair], what: str, disable_tqdm: bool) -> list[Likelihood]:
    with tqdm(total=len(pairs), desc=what, disable=disable_tqdm or None) as progress:
      return continuations.likelihoods(self._subject, pairs, progress.update)

  def _end(self, context: np.ndarray, tokens: int) -> np.ndarray:
    return context[max(len(context) - tokens, 0) :]

  def _warn_of_cuts(self, whole: Sequence[np.ndarray], kept: Sequence[np.ndarray]) -> None:
    if cut := sum(len(a) > len(b) for a, b in zip(whole, kept, strict=True)):
      logging.warning(
        "%d of %d contexts are longer than --lengths=%d allows: their beginnings are cut off",
        cut, len(whole), self.max_length,
      )  # fmt: skip


def check(names: Sequence[str], include_path: str | None) -> None:
  """Raises ConfigError if the harness has no task, group or tag of a name."""
  for name in names:
    every = _manager(name, include_path).all_tasks
    if name in every:
      continue
    close = difflib.get_close_matches(name, every, n=8, cutoff=0.5)
    raise ConfigError(
      f"lm-evaluation-harness has no task {name}"
      + (f"; it has {', '.join(close)}" if close else "")
      + f" (`lm-eval ls tasks` lists all {len(every):,}; --include_path=FOLDER adds your own)"
    )


def run(name: str, subject: Subject, options: Options) -> Iterator[Result]:
  """A result for the task, or for each task of a group, at each length.

  Raises:
    ConfigError: A package that the task needs is missing, or the length is too short for it.
  """
  # The harness bootstraps in forked processes, which hang because JAX has threads.
  os.environ["DISABLE_MULTIPROC"] = "1"
  for length in options.lengths or (subject.data.length,):
    try:
      evaluation = evaluator.simple_evaluate(
        HarnessModel(subject, length),
        tasks=[name],
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=_manager(name, options.include_path),
        bootstrap_iters=BOOTSTRAPS,
        log_samples=False,
      )
    except ImportError as error:
      raise ConfigError(f"lm_eval:{name} needs another package: {error}") from error
    for task, metrics in evaluation["results"].items():
      if values := _values(metrics):
        yield _result(task, length, values, evaluation)


def _result(task: str, length: int, values: dict[str, float], evaluation: dict) -> Result:
  settings = {"length": length}
  if (shots := evaluation["n-shot"].get(task)) is not None:
    settings["shots"] = int(shots)
  if (version := evaluation["versions"].get(task)) is not None:
    settings["version"] = str(version)
  if (rows := evaluation["n-samples"].get(task)) is not None:
    values["rows"] = int(rows["effective"])
  return Result(task, settings, values)


def _values(metrics: dict) -> dict[str, float]:
  """{"acc,none": 0.5, "f1,all": 0.2, "f1_stderr,all": 0.1} as {"acc": 0.5, "f1/all": 0.2, "f1/all_stderr": 0.1}."""
  values = {}
  for key, value in metrics.items():
    metric, comma, filtering = key.partition(",")
    if comma and isinstance(value, numbers.Real):
      name = metric.removesuffix("_stderr")
      filtered = name if filtering == "none" else f"{name}/{filtering}"
      values[filtered + metric.removeprefix(name)] = float(value)
  return values


def _manager(name: str, include_path: str | None) -> TaskManager:
  """The manager that has the task: the user's folder alone if it does, because reading 14,000 tasks takes long."""
  if include_path is not None:
    manager = _index(include_path, False)
    if name in manager.all_subtasks:
      return manager
  return _index(include_path, True)


@functools.cache
def _index(include_path: str | None, defaults: bool) -> TaskManager:
  return TaskManager(include_path=include_path, include_defaults=defaults)


def _ids(tokens: Sequence[int]) -> np.ndarray:
  return np.asarray(tokens, np.int32)
