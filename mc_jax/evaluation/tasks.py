"""The tasks by name, and the loop that runs them.

lm_eval:NAME is the task NAME of lm-evaluation-harness, which is imported only if such a task is requested.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

from mc_jax.data import DataConfig
from mc_jax.data.config import TASKS as RECALL_TASKS
from mc_jax.errors import ConfigError, missing_package
from mc_jax.evaluation import gates, perplexity, recall, usage
from mc_jax.evaluation.subject import Options, Result, Subject
from mc_jax.models import ModelConfig

_RECALL = {
  "mqar": (recall.mqar, recall.answers_of_rows),
  "niah1": (recall.niah("single_1"), recall.rows_as_a_whole),
  "niah2": (recall.niah("single_2"), recall.rows_as_a_whole),
  "niah3": (recall.niah("single_3"), recall.rows_as_a_whole),
}
_GATES = {f"gates_{name}": rows for name, (rows, _) in _RECALL.items()}

TASKS = {
  "perplexity": perplexity.run,
  **{name: recall.accuracy(name, *how) for name, how in _RECALL.items()},
  "facts": recall.facts,
  **{name: gates.reads(name, rows) for name, rows in _GATES.items()},
  "usage": usage.run,
}
HARNESS = "lm_eval:"


def check(names: Sequence[str], include_path: str | None = None) -> tuple[str, ...]:
  """The names without duplicates, or ConfigError for unknown ones; `include_path` as in Options."""
  unknown = [name for name in names if name not in TASKS and not name.startswith(HARNESS)]
  if unknown or not names:
    got = ", ".join(unknown) or "none"
    raise ConfigError(
      f"--tasks must be one or more of {', '.join(TASKS)}, or {HARNESS}TASK for one of lm-evaluation-harness; got {got}"
    )
  if requested := [name.removeprefix(HARNESS) for name in names if name.startswith(HARNESS)]:
    _harness().check(requested, include_path)
  return tuple(dict.fromkeys(names))


def unsuited(names: Sequence[str], model: ModelConfig) -> dict[str, str]:
  """The tasks that cannot be run on such a model, and why."""
  reasons = dict.fromkeys(_GATES, gates.problem(model)) | {"usage": usage.problem(model)}
  return {name: why for name in names if (why := reasons.get(name))}


def problems(names: Sequence[str], data: DataConfig, options: Options) -> list[str]:
  """Why tasks cannot be run on models of such data, one line each, as far as is known before training."""
  lines = []
  for name in names:
    if (rows := name.removeprefix("gates_")) in (*_RECALL, "facts"):
      lines += [f"--tasks={name}: {line}" for line in recall.problems(rows, data, options)]
    elif name != "usage" and all(source.source in RECALL_TASKS for source in data.parts.values()):
      lines.append(f"--tasks={name} is of text; data.source={data.source} is a recall task")
    elif name == "perplexity" and (line := perplexity.problem(options.lengths)):
      lines.append(line)
  return list(dict.fromkeys(lines))


def run(names: Sequence[str], subject: Subject, options: Options) -> Iterator[Result]:
  """The results, one by one.

  Raises:
    ConfigError: An unknown task, or one that does not suit the subject or the options.
  """
  for name in check(names, options.include_path):
    if name in TASKS:
      yield from TASKS[name](subject, options.check())
    else:
      yield from _harness().run(name.removeprefix(HARNESS), subject, options.check())


def _harness() -> ModuleType:
  try:
    from mc_jax.evaluation import harness
  except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lm_eval":
      raise
    raise missing_package(f"a task of lm-evaluation-harness ({error})", "lm-eval", "eval") from error
  return harness
