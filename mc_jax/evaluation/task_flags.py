"""The flags of the doors that evaluate: which tasks, and what they are told."""

from __future__ import annotations

from absl import flags

from mc_jax import cli
from mc_jax.evaluation import Options, tasks

_NAMES = ("lengths", "pairs", "rows", "limit", "num_fewshot", "include_path")  # as in Options


def define() -> None:
  """Defines --tasks and a flag for each field of Options."""
  text = f"one or more of {', '.join(tasks.TASKS)}; {tasks.HARNESS}TASK for one of lm-evaluation-harness"
  flags.DEFINE_list("tasks", None, text)
  cli.numbers_flag("lengths", [], "of rows, in tokens; default: the run's")
  cli.numbers_flag("pairs", [], "mqar: numbers of key-value pairs; default: data.mqar.pairs")
  flags.DEFINE_integer("rows", 256, "rows of each setting of a recall task")
  flags.DEFINE_float("limit", None, "lm_eval: documents of each task, or below 1 their share; default: all")
  flags.DEFINE_integer("num_fewshot", None, "lm_eval: answered examples before each; default: the task's")
  cli.path_flag("include_path", None, "lm_eval: folder with tasks of your own")


def options() -> Options:
  """What the flags say, checked.

  Raises:
    ConfigError: naming the flag.
  """
  lists = {name: tuple(flags.FLAGS[name].value) for name in ("lengths", "pairs")}
  return Options(**{name: flags.FLAGS[name].value for name in _NAMES} | lists).check()


def names() -> tuple[str, ...]:
  """The tasks, each once; () without the flag.

  Raises:
    ConfigError: an unknown one.
  """
  asked = flags.FLAGS["tasks"].value
  return () if asked is None else tasks.check(asked, flags.FLAGS["include_path"].value)


def arguments() -> list[str]:
  """What to tell another process, so that its `options` are these."""
  told = {name: flags.FLAGS[name].value for name in _NAMES}
  texts = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in told.items()}
  return [f"--{name}={text}" for name, text in texts.items() if text not in ("", None)]
