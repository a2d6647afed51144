"""The settings that the paper's sizes share (arXiv:2602.24281, table 6): titans_760m.py and others use them."""

from mc_jax.training import config

SIZES = {
  "760M": dict(layers=24, d_model=1536, heads=16, learning_rate=1.25e-3, steps=57_000),  # 30 billion tokens
  "1.3B": dict(layers=18, d_model=2048, heads=8, learning_rate=7e-4, steps=190_000),  # 100 billion tokens
}


def titans(size: str):
  """Titans with gated residual memory (grm)."""
  c = paper(**SIZES[size])
  c.model.memory.rule = "titans"
  c.model.memory.aggregation = "grm"
  c.model.memory.segment_length = 256
  c.model.memory.chunk = 256  # at head_dim 256, kernels do more per cycle than with chunks of 128: docs/plan.md
  return c


def gated_deltanet(size: str):
  """Gated DeltaNet with gated residual memory (grm), values twice as wide as keys."""
  c = paper(**SIZES[size])
  c.model.memory.rule = "gated_deltanet"
  c.model.memory.aggregation = "grm"
  c.model.memory.segment_length = 256
  c.model.memory.chunk = 128
  return c


def transformer(size: str):
  """The Transformer baseline."""
  c = paper(**SIZES[size])
  c.model.pattern = ("attention",)
  return c


def paper(*, layers: int, d_model: int, heads: int, learning_rate: float, steps: int):
  """The default tree at a size, for any model."""
  c = config.default()

  c.model.vocab_size = 32_768  # the paper's 32k; a power of two, so that any mesh.model divides it into whole tiles
  c.model.layers = layers
  c.model.d_model = d_model
  c.model.heads = heads
  c.model.dtype = "bfloat16"
  c.model.remat = "full"

  c.data.source = "text"  # as bytes; docs/data.md explains sources, tokenizers and packing
  c.data.paths = "corpus/**"
  c.data.length = 4096
  c.data.batch_size = 128  # rows in a step: 0.5M tokens

  c.optimizer.learning_rate = learning_rate
  c.optimizer.weight_decay = 0.1
  c.optimizer.warmup_steps = 1000

  c.mesh.data = 1
  c.mesh.fsdp = -1  # all devices: each has its own rows, and its share of parameters and optimiser state

  c.train.steps = steps
  c.train.log_every = 20
  c.train.eval_every = 1000
  c.train.checkpoint_every = 1000
  return c
