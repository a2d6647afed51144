"""Recall beyond a small memory: multi-query associative recall with more pairs than one memory can hold.

    python -m mc_jax.train --config=configs/recall.py --workdir=runs/recall --config.model.memory.aggregation=ssc

Rows of 64 tokens: 2, 4, 8 or 16 pairs of a key and a value, then the keys again at random places among random tokens;
only the requested values count in the loss (docs/recall.md). Rows of few pairs teach the task, rows of many pairs need
a large memory: each of the two layers has four memories of 8 x 8 numbers (linear, swla), and a segment is 2 pairs.
docs/results.md has the results for every rule and aggregation, and the time they took.
"""

from mc_jax.training import config


def get_config():
  """The default tree, made small."""
  c = config.default()

  c.data.source = "mqar"
  c.data.mqar.vocab_size = 256  # 127 keys, 128 values
  c.data.mqar.pairs = (2, 4, 8, 16)  # each row has one of these numbers of pairs
  c.data.length = 64
  c.data.batch_size = 32  # rows in a step: 240 answers on average
  c.data.validation_tokens = 16_384  # 256 rows

  c.model.vocab_size = 256
  c.model.layers = 2
  c.model.d_model = 32
  c.model.heads = 4  # memories per layer
  c.model.remat = "none"  # so small a model has nothing to save memory for
  c.model.memory.rule = "linear"
  c.model.memory.aggregation = "grm"
  c.model.memory.carry = "independent"
  c.model.memory.segment_length = 4  # a row has 16 segments: up to 15 cached memories to read
  c.model.memory.chunk = 4  # tokens between two writes

  c.optimizer.learning_rate = 5e-3
  c.optimizer.warmup_steps = 30

  c.train.steps = 1500
  c.train.eval_every = 500
  c.train.checkpoint_every = 500
  c.train.log_every = 100
  c.train.sample_length = 0  # ids are not text
  return c
