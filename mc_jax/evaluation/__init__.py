"""Evaluation: the tasks that a trained model is measured by, in tables, files and plots.

`tasks` runs the tasks by name on a `Subject`: `perplexity`, `recall` and the `gates` of recall rows take batches and
score them with `scoring`; `harness` answers lm-evaluation-harness with `continuations`, which score or write what
follows a context. All return `Result`s, which `report` prints, writes and
plots, with `heatmaps` for gates; `compare` puts several evaluations into one table and plot. `task_flags` are the flags
that the doors mc_jax.evaluate and mc_jax.ablate share.
"""

from mc_jax.evaluation import continuations, gates, perplexity, recall, report, scoring, tasks
from mc_jax.evaluation.subject import Options, Result, Subject

__all__ = [
  "Options",
  "Result",
  "Subject",
  "continuations",
  "gates",
  "perplexity",
  "recall",
  "report",
  "scoring",
  "tasks",
]
