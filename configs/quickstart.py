"""A first run: Titans with gated residual memory (grm) learns the Python standard library.

    python -m mc_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

The corpus is the source code of your Python's standard library, with bytes as tokens: nothing is
downloaded, and no accelerator is needed. On two CPU cores it takes two to three minutes, compiling
included, and reaches 2.28 bits per byte on validation text, where counting pairs of bytes (bigram)
reaches 3.5. The same command resumes a stopped run.
"""

from mc_jax.training import config


def get_config():
  """The default tree, made small."""
  c = config.default()

  c.model.layers = 2
  c.model.d_model = 128
  c.model.heads = 4  # memories per layer, each a network 32 -> 128 -> 32
  c.model.remat = "none"  # the model is too small to need to save memory
  c.model.memory.rule = "titans"
  c.model.memory.aggregation = "grm"
  c.model.memory.segment_length = 64  # a row has 4 segments: up to 3 cached memories to read
  c.model.memory.chunk = 64  # tokens between two writes

  c.data.source = "stdlib"
  c.data.length = 256  # bytes in a row
  c.data.batch_size = 4  # rows in a step: 1,024 bytes
  c.data.validation_tokens = 65_536

  c.optimizer.learning_rate = 4e-3
  c.optimizer.warmup_steps = 30

  c.train.steps = 500
  c.train.eval_every = 125
  c.train.checkpoint_every = 125
  return c
