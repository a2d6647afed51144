"""Evaluates a trained model: `python -m mc_jax.evaluate --workdir=RUN --tasks=perplexity,mqar --lengths=512,1024`.

Any field of the run's configuration that leaves the parameters as they are can be changed, such as
--config.model.memory.after_training=moving_average. Tables, JSON, CSV and plots go to RUN/evaluation.
"""

import dataclasses
import re
import time

import mc_jax.xla_flags  # noqa: F401  isort: skip  (before jax)
from absl import flags, logging

from mc_jax import cli, storage
from mc_jax.data.identity import Identity
from mc_jax.errors import ConfigError
from mc_jax.evaluation import Subject, report, task_flags, tasks
from mc_jax.training import config, outputs, state, trained

CONFIG = cli.overrides_flag()
WORKDIR = cli.path_flag("workdir", None, "folder of a run of mc_jax.train, or gs://BUCKET/FOLDER")
STEP = flags.DEFINE_integer("step", None, "of the checkpoint; default: the newest")
NAME = flags.DEFINE_string("name", None, "of the files in RUN/evaluation; default: tasks and fields that were changed")
task_flags.define()


def main(_: list[str]) -> None:
  """Evaluates as the flags say."""
  begin = time.monotonic()
  options, names = task_flags.options(), task_flags.names()
  workdir, changes = outputs.workdir(WORKDIR.value), cli.overrides(CONFIG)
  model = trained.load(workdir, changes, step=STEP.value)
  if unsuited := tasks.unsuited(names, model.config.model):
    raise ConfigError("\n".join(f"--tasks: {name}: {why}" for name, why in unsuited.items()))
  _require_lengths(model.config, options.lengths, model.mesh.size)
  data = model.config.data
  if "perplexity" in names and data.has_documents:
    for field in {"data.seed", "data.validation_fraction"} & changes.keys():
      logging.warning("%s decides which documents are held out: the model may have been trained on these", field)
  changed = "".join(f", {field}={value}" for field, value in changes.items())
  print(f"{workdir}, step {model.step:,}{changed}", flush=True)
  subject = Subject(
    state.graph(model.config),
    model.params,
    model.config.model.vocab_size,
    data,
    model.mesh,
    _trained_on(model, changes),
  )
  results = []
  for result in tasks.run(names, subject, options):
    results.append(result)
    print(f"[{time.monotonic() - begin:6.1f} s] {report.line(result)}", flush=True)
  print(f"\n{report.table(results)}\n")
  record = {
    "workdir": str(workdir),
    "step": model.step,
    "command": cli.command("evaluate"),
    "changed": changes,
    "config": dataclasses.asdict(model.config),
    "results": report.to_json(results),
  }
  name = NAME.value or _name(names, changes)
  with outputs.outputs(workdir) as files:
    folder = files.folder / "evaluation"
    folder.mkdir(exist_ok=True)
    storage.write(folder / f"{name}.json", report.dumps(record))
    storage.write(folder / f"{name}.csv", report.to_csv(results))
    drawn = report.plot(folder / f"{name}.png", {name: results})
  written = ", ".join([f"{name}.json", f"{name}.csv", *(path.name for path in drawn)])
  print(f"written to {workdir / 'evaluation'}: {written}")


def _trained_on(model: trained.Trained, changes: dict[str, object]) -> Identity | None:
  """The identity to compare the evaluated data with: the run's, without its files where the user names others."""
  if model.identity is not None and any(re.match(r"data\.(source|paths|field)", field) for field in changes):
    return dataclasses.replace(model.identity, files={})
  return model.identity


def _require_lengths(run: config.Config, lengths: tuple[int, ...], devices: int) -> None:
  """Raises ConfigError where the model or its mesh cannot take rows of these lengths."""
  for length in lengths:
    longer = config.replace(run, {"data.length": length})
    data = longer.data.problems("data")  # tasks have data of their own, and check them
    found = [problem for problem in longer.problems() if problem not in data and problem not in run.problems()]
    if found:
      raise ConfigError("\n".join(found))
    longer.check_devices(devices)


def _name(names: tuple[str, ...], changes: dict[str, object]) -> str:
  """Such as perplexity_after_training=grm: fit for a file."""
  parts = [*names, *(f"{field.rpartition('.')[2]}={value}" for field, value in changes.items())]
  return re.sub(r"[^\w.=-]+", "-", "_".join(parts))[:120]


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir", "tasks"])
  cli.run(main, CONFIG, verbosity=logging.WARNING, outlives_output=True)
