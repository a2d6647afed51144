"""Evaluation of models: what they make of a task's batches, in tables, files and plots."""

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
