"""The tasks by name, and what runs them one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mc_jax.data import ConfigError
from mc_jax.evaluation import perplexity, recall
from mc_jax.evaluation.subject import Options, Result, Subject

TASKS = {
  "perplexity": perplexity.run,
  "mqar": recall.mqar,
  "niah1": recall.niah("niah1", "single_1"),
  "niah2": recall.niah("niah2", "single_2"),
  "niah3": recall.niah("niah3", "single_3"),
}


def check(names: Sequence[str]) -> tuple[str, ...]:
  """The names, each once, or ConfigError."""
  unknown = [name for name in names if name not in TASKS]
  if unknown or not names:
    got = ", ".join(unknown) or "none"
    raise ConfigError(f"--tasks must be one or more of {', '.join(TASKS)}; got {got}")
  return tuple(dict.fromkeys(names))


def run(names: Sequence[str], subject: Subject, options: Options) -> Iterator[Result]:
  """The results, as they come.

  Raises:
    ConfigError: an unknown task, or one that the subject or the options do not suit.
  """
  for name in check(names):
    yield from TASKS[name](subject, options.check())
