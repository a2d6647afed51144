"""The flags of doors that evaluate: the tasks and their options."""

from __future__ import annotations

import dataclasses

from absl import flags

from mc_jax import cli
from mc_jax.evaluation import Options, tasks

_NAMES = tuple(field.name for field in dataclasses.fields(Options))


def define() -> None:
  """Defines --tasks and a flag for each field of Options."""
  text = f"One or more of {', '.join(tasks.TASKS)}; {tasks.HARNESS}TASK for a task of lm-evaluation-harness."
  flags.DEFINE_list("tasks", None, text)
  cli.numbers_flag("lengths", [], "Lengths of rows in tokens; default: the run's.")
  cli.numbers_flag("pairs", [], "mqar: Numbers of key-value pairs; default: data.mqar.pairs.")
  flags.DEFINE_integer("rows", Options.rows, "Rows in each setting of a recall task.")
  flags.DEFINE_float(
    "limit", None, "lm_eval: Number of documents in each task, or their share if below 1; default: all."
  )
  flags.DEFINE_integer("num_fewshot", None, "lm_eval: Number of examples before each question; default: the task's.")
  cli.path_flag("include_path", None, "lm_eval: Folder with tasks of your own.")


def options() -> Options:
  """The options from the flags, checked.

  Raises:
    ConfigError: A wrong value; the error names the flag.
  """
  lists = {name: tuple(flags.FLAGS[name].value) for name in ("lengths", "pairs")}
  return Options(**{name: flags.FLAGS[name].value for name in _NAMES} | lists).check()


def names() -> tuple[str, ...]:
  """The tasks without duplicates; () without the flag.

  Raises:
    ConfigError: An unknown task.
  """
  names = flags.FLAGS["tasks"].value
  return () if names is None else tasks.check(names, flags.FLAGS["include_path"].value)


def arguments() -> list[str]:
  """The flags for another process to have the same `options`."""
  values = {name: flags.FLAGS[name].value for name in _NAMES}
  texts = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in values.items()}
  return [f"--{name}={text}" for name, text in texts.items() if text not in ("", None)]
