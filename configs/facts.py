"""Facts: what a small model's parameters remember of a world that is larger than they are.

    python -m mc_jax.train --config=configs/facts.py --workdir=runs/facts
    python -m mc_jax.evaluate --workdir=runs/facts --tasks=facts

Rows of 64 tokens state 16 facts of a fixed world (docs/recall.md); only their values count in the loss. No row has a
fact twice, so that its value is known from other rows or not at all. A model that knows nothing pays 6 bits an answer;
this one, of 44,000 parameters, sees each fact some 62 times and then knows a quarter of them. Memory layers add
parameters at little cost (docs/layers.md):

    --config.model.feed_forward=product_keys,swiglu --config.model.product_keys.codebook=128
    --config.optimizer.memory_values.learning_rate=5e-2
"""

from mc_jax.training import config


def get_config():
  """The default tree, made small."""
  c = config.default()

  c.data.source = "facts"
  c.data.facts.count = 8_192  # of 2,048 entities: 49,152 bits
  c.data.facts.attributes = 4
  c.data.facts.value_ids = 64
  c.data.facts.name_ids = 64
  c.data.facts.name_length = 2
  c.data.length = 64
  c.data.batch_size = 32  # rows in a step: 512 answers
  c.data.validation_tokens = 16_384  # 256 rows: 4,096 answers

  c.model.vocab_size = 256  # 133 are used
  c.model.layers = 2
  c.model.d_model = 32
  c.model.heads = 2  # memories per layer
  c.model.remat = "none"  # so small a model has nothing to save memory for
  c.model.memory.rule = "linear"
  c.model.memory.aggregation = "none"  # a row tells nothing that a cache could hold
  c.model.memory.segment_length = 64
  c.model.memory.chunk = 64
  c.model.product_keys.heads = 2  # 16 values a token
  c.model.product_keys.top_k = 8
  c.model.product_keys.key_dim = 32

  c.optimizer.learning_rate = 1e-2
  c.optimizer.warmup_steps = 50
  c.optimizer.weight_decay = 0.0  # facts are to be kept
  c.optimizer.memory_values.weight_decay = 0.0

  c.train.steps = 1000
  c.train.eval_every = 500
  c.train.checkpoint_every = 1000
  c.train.log_every = 100
  c.train.sample_length = 0  # ids are not text
  return c
