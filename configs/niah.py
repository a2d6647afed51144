"""Needles in haystacks: a small Titans with gated residual memory (grm) learns to find a number or a uuid in a text.

    python -m mc_jax.train --config=configs/niah.py --workdir=runs/niah

Each row is one of RULER's single-needle tasks (arXiv:2404.06654; docs/recall.md): a passkey in noise, a number in
prose, or a uuid in prose; bytes are tokens, and only the answer's bytes count in the loss. A model that knows the form
of answers but nothing of the text reaches 3.2 bits per byte of answer. The prose is a text included in the package, or
your own: --config.data.paths='books/*.txt'. For several keys or values, and longer rows:

    --config.data.niah.tasks="('multikey_1', 'multivalue', 'multiquery')" --config.data.length=4096
"""

from mc_jax.training import config


def get_config():
  """The default tree, made small."""
  c = config.default()

  c.data.source = "niah"
  c.data.niah.tasks = ("single_1", "single_2", "single_3")
  c.data.length = 1024  # bytes in a row, nearly all of them haystack
  c.data.batch_size = 4
  c.data.validation_tokens = 32_768  # 32 rows

  c.model.layers = 2
  c.model.d_model = 128
  c.model.heads = 4  # memories per layer, each a network 32 -> 128 -> 32
  c.model.remat = "none"
  c.model.memory.rule = "titans"
  c.model.memory.aggregation = "grm"
  c.model.memory.segment_length = 128  # a row has 8 segments: up to 7 cached memories to read
  c.model.memory.chunk = 64  # tokens between two writes

  c.optimizer.learning_rate = 4e-3
  c.optimizer.warmup_steps = 50

  c.train.steps = 2000
  c.train.eval_every = 200
  c.train.checkpoint_every = 200
  return c
