"""Evaluates a run's checkpoint: which tasks suit it, and the files that the evaluation writes into its workdir."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from absl import logging
from etils import epath

from mc_jax import storage
from mc_jax.data.identity import Identity
from mc_jax.errors import ConfigError
from mc_jax.evaluation import report, tasks
from mc_jax.evaluation.subject import Options, Result, Subject
from mc_jax.training import config as config_lib
from mc_jax.training import outputs, state
from mc_jax.training.config import Config
from mc_jax.training.trained import Trained


def subject(model: Trained, changes: Mapping[str, object], names: Sequence[str], options: Options) -> Subject:
  """The subject that tasks evaluate.

  Args:
    model: The checkpoint.
    changes: Fields of the run's configuration that the user changed.
    names: The tasks.
    options: The tasks' options.

  Raises:
    ConfigError: A task or a length that does not suit the model or its mesh.
  """
  config = model.config
  if unsuited := tasks.unsuited(names, config.model):
    raise ConfigError("\n".join(f"--tasks: {name}: {why}" for name, why in unsuited.items()))
  _require_lengths(config, options.lengths, model.mesh.size)
  if "perplexity" in names and config.data.has_documents:
    for field in {"data.seed", "data.validation_fraction"} & changes.keys():
      logging.warning("%s decides which documents are held out: the model may have been trained on these", field)
  size, identity = config.model.vocab_size, _identity(model, changes)
  return Subject(state.graph(config), model.params, size, config.data, model.mesh, identity)


def file_name(names: Sequence[str], changes: Mapping[str, object]) -> str:
  """The default name of an evaluation's files, such as perplexity_after_training=grm."""
  words = [*names, *(f"{field.rpartition('.')[2]}={value}" for field, value in changes.items())]
  return re.sub(r"[^\w.=-]+", "-", "_".join(words))[:120]


def write(workdir: epath.Path, name: str, record: Mapping[str, object], results: Sequence[Result]) -> list[str]:
  """Writes JSON, CSV and plots to evaluation/ in the workdir, and returns the files' names.

  Args:
    workdir: The run's folder.
    name: The files' name without extension.
    record: What the JSON says besides the results.
    results: The results.
  """
  with outputs.outputs(workdir) as files:
    folder = files.folder / "evaluation"
    folder.mkdir(exist_ok=True)
    storage.write(folder / f"{name}.json", report.dumps({**record, "results": report.to_json(results)}))
    storage.write(folder / f"{name}.csv", report.to_csv(results))
    drawn = report.plot(folder / f"{name}.png", {name: results})
  return [f"{name}.json", f"{name}.csv", *(path.name for path in drawn)]


def _identity(model: Trained, changes: Mapping[str, object]) -> Identity | None:
  """The identity to compare the evaluated data with: the run's, without its files if the user names others."""
  if model.identity is not None and any(re.match(r"data\.(source|paths|field)", field) for field in changes):
    return dataclasses.replace(model.identity, files={})
  return model.identity


def _require_lengths(config: Config, lengths: Sequence[int], devices: int) -> None:
  """Raises ConfigError if the model or its mesh cannot take rows of these lengths."""
  for length in lengths:
    longer = config_lib.replace(config, {"data.length": length})
    known = {*longer.data.problems("data"), *config.problems()}  # tasks have data of their own, and check them
    if new := [problem for problem in longer.problems() if problem not in known]:
      raise ConfigError("\n".join(new))
    longer.check_devices(devices)
