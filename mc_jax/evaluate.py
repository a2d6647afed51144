"""Evaluates a trained model: `python -m mc_jax.evaluate --workdir=RUN --tasks=perplexity,mqar --lengths=512,1024`.

Fields of the run's configuration that do not affect the parameters can be changed, such as
--config.model.memory.after_training=moving_average. Tables, JSON, CSV and plots go to RUN/evaluation.
"""

import dataclasses
import time

import mc_jax.xla_flags  # noqa: F401  isort: skip  (before jax)
from absl import flags, logging

from mc_jax import cli
from mc_jax.evaluation import report, task_flags, tasks
from mc_jax.training import evaluating, outputs, trained

CONFIG = cli.overrides_flag()
WORKDIR = cli.path_flag("workdir", None, "Folder of a run of mc_jax.train, or gs://BUCKET/FOLDER.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
NAME = flags.DEFINE_string(
  "name", None, "Name of the files in RUN/evaluation; default: the tasks and the changed fields."
)
task_flags.define()


def main(_: list[str]) -> None:
  """Evaluates as the flags say."""
  begin = time.monotonic()
  options, names = task_flags.options(), task_flags.names()
  workdir, changes = outputs.workdir(WORKDIR.value), cli.overrides(CONFIG)
  model = trained.load(workdir, changes, step=STEP.value)
  subject = evaluating.subject(model, changes, names, options)
  changed = "".join(f", {field}={value}" for field, value in changes.items())
  print(f"{workdir}, step {model.step:,}{changed}", flush=True)
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
  }
  files = evaluating.write(workdir, NAME.value or evaluating.file_name(names, changes), record, results)
  print(f"written to {workdir / 'evaluation'}: {', '.join(files)}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir", "tasks"])
  cli.run(main, CONFIG, verbosity=logging.WARNING, outlives_output=True)
