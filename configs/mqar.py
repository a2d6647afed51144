"""Multi-query associative recall: a small Titans with gated residual memory (grm) learns to look up values by keys.

    python -m mc_jax.train --config=configs/mqar.py --workdir=runs/mqar

Rows of 32 tokens: 2 or 4 pairs of a key and a value, then the keys again at random places among random tokens; only
the requested values count in the loss (docs/recall.md). A model that knows only which tokens are values reaches 7 bits
an answer; one that recalls reaches 0. For the paper's size (arXiv:2312.04927), set:

    --config.data.mqar.vocab_size=8192 --config.model.vocab_size=8192
    --config.data.length=512 --config.data.mqar.pairs=64
    --config.model.memory.segment_length=64 --config.model.memory.chunk=64
"""

from mc_jax.training import config


def get_config():
  """The default tree, made small."""
  c = config.default()

  c.data.source = "mqar"
  c.data.mqar.vocab_size = 256  # 127 keys, 128 values
  c.data.mqar.pairs = (2, 4)  # each row has one of these numbers of pairs
  c.data.length = 32
  c.data.batch_size = 64  # rows in a step: 192 answers on average
  c.data.validation_tokens = 8_192  # 256 rows

  c.model.vocab_size = 256
  c.model.layers = 2
  c.model.d_model = 64
  c.model.heads = 2  # memories per layer
  c.model.remat = "none"  # the model is too small to need to save memory
  c.model.memory.rule = "titans"
  c.model.memory.aggregation = "grm"
  c.model.memory.segment_length = 8  # a row has 4 segments: up to 3 cached memories to read
  c.model.memory.chunk = 8  # tokens between two writes

  c.optimizer.learning_rate = 5e-3
  c.optimizer.warmup_steps = 30

  c.train.steps = 500
  c.train.eval_every = 100
  c.train.checkpoint_every = 100
  c.train.sample_length = 0  # ids are not text
  return c
