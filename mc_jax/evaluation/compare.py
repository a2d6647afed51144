"""Draws several evaluations together, and prints them as one table.

    python -m mc_jax.evaluation.compare --png=OUT.png base=runs/a/evaluation/perplexity.json grm=runs/b/evaluation/...

With --baseline=base, differences from it are drawn. A FILE without LABEL is labelled by its name: the plot of
mc_jax.evaluate is drawn again.
"""

import json
import pathlib

from absl import flags

from mc_jax import cli, storage
from mc_jax.errors import ConfigError
from mc_jax.evaluation import report

PNG = cli.path_flag(
  "png", None, "File to plot in, with X_map.png beside X.png for gates; default: only print.", written=True
)
BASELINE = flags.DEFINE_string("baseline", None, "Label of the series that the others are compared with.")


def main(argv: list[str]) -> None:
  """Compares the files given as LABEL=FILE or FILE."""
  alone = {argument: storage.path(argument) for argument in argv[1:]}
  pairs = [(path.stem, path) if path.is_file() else name.partition("=")[::2] for name, path in alone.items()]
  if not pairs or not all(label and file for label, file in pairs):
    raise ConfigError("give the files to compare as LABEL=FILE or FILE, each a JSON file of mc_jax.evaluate")
  series = {}
  for label, file in pairs:
    try:
      series[label] = report.from_json(json.loads(storage.path(str(file)).read_text(encoding="utf-8"))["results"])
    except (ValueError, KeyError, TypeError) as error:
      raise ConfigError(f"{file} is not a JSON file of mc_jax.evaluate: {error!r}") from error
  if BASELINE.value and BASELINE.value not in series:
    raise ConfigError(f"--baseline must be one of {', '.join(series)}, got {BASELINE.value}")
  for label, results in series.items():
    print(f"{label}\n{report.table(results)}\n")
  if PNG.value:
    if not (drawn := report.plot(pathlib.Path(PNG.value), series, BASELINE.value)):
      raise ConfigError(f"--png={PNG.value}: no gates, and nothing at several lengths or numbers of pairs")
    print(f"drawn in {', '.join(map(str, drawn))}")


if __name__ == "__main__":
  cli.run(main, parse=cli.parse_arguments)
