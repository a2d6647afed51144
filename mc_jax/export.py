"""Writes a run's model as safetensors: `python -m mc_jax.export --workdir=RUN --to=FOLDER --dtype=bfloat16`.

docs/export.md lists the tensors' names and how to read them. Fields of the configuration that do not affect the
parameters can be changed, such as --config.model.memory.after_training=moving_average.
"""

import mc_jax.xla_flags  # noqa: F401  isort: skip  (before jax)
from absl import flags, logging

from mc_jax import cli
from mc_jax.errors import ConfigError
from mc_jax.inference import export
from mc_jax.training import outputs, trained

CONFIG = cli.overrides_flag()
WORKDIR = cli.path_flag("workdir", None, "Folder of a run of mc_jax.train, or gs://BUCKET/FOLDER.")
TO = cli.path_flag("to", None, "Folder to write to, new or empty.")
DTYPE = flags.DEFINE_enum("dtype", "float32", export.DTYPES, "Dtype of the tensors.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")


def main(_: list[str]) -> None:
  """Exports as the flags say."""
  export.require_empty(TO.value)  # before the checkpoint is read
  workdir = outputs.workdir(WORKDIR.value)
  model = trained.load(workdir, cli.overrides(CONFIG), step=STEP.value)
  try:
    tokenizer = model.tokenizer_file()
  except ConfigError as error:
    logging.warning("exporting without the tokenizer: %s", error)
    tokenizer = {}
  files = export.save(TO.value, model.config.model, model.params, dtype=DTYPE.value, others=tokenizer)
  names = files[0].name if len(files) == 1 else f"{len(files)} files and {export.INDEX}"
  size = sum(file.stat().st_size for file in files)
  print(f"{workdir}, step {model.step:,}: {size / 1e6:,.2f} MB of {DTYPE.value} in {TO.value}")
  print(", ".join([names, export.CONFIG, *tokenizer]))


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir", "to"])
  cli.run(main, CONFIG, verbosity=logging.WARNING, outlives_output=True)
