"""Titans with gated residual memory (grm) at the paper's 1.3B size (arXiv:2602.24281, table 6).

    python -m mc_jax.plan --config=configs/titans_1b.py --topology=v5p:4x4x4
    python -m mc_jax.train --config=configs/titans_1b.py --workdir=runs/titans_1b

1,205,729,712 parameters. One cached memory of all layers is 151.0 MB in bfloat16,
a sequence's 16 take 2,416 MB; the keys and values of a Transformer of this size take 604 MB.
Planned on v5p:4x4x4, 64 chips (docs/plan.md, the compiler's estimate): 5.1 of 95 GiB a
chip, 661 ms a step of 0.5M tokens, 793,236 tokens per second, MFU 37%.

The paper's other models are flags: --config.model.memory.rule=dla (or swla, linear) and
--config.model.memory.aggregation=ssc (or soup, residual; none is the base recurrence). For a longer context use
fewer rows, and more devices per row: --config.data.length=32768 --config.data.batch_size=16 --config.mesh.model=4.
"""

from mc_jax.training import config


def get_config():
  """The default tree at this size."""
  c = config.default()

  c.model.vocab_size = 32_768  # the paper's 32k; a power of two, so that any mesh.model divides it into whole tiles
  c.model.layers = 18
  c.model.d_model = 2048
  c.model.heads = 8
  c.model.dtype = "bfloat16"
  c.model.remat = "full"
  c.model.memory.rule = "titans"
  c.model.memory.aggregation = "grm"
  c.model.memory.segment_length = 256
  c.model.memory.chunk = 256  # at head_dim 256, kernels do more per cycle than with chunks of 128: docs/plan.md

  c.data.source = "text"  # as bytes; docs/data.md explains sources, tokenizers and packing
  c.data.paths = "corpus/**"
  c.data.length = 4096
  c.data.batch_size = 128  # rows in a step: 0.5M tokens

  c.optimizer.learning_rate = 7e-4
  c.optimizer.weight_decay = 0.1
  c.optimizer.warmup_steps = 1000

  c.mesh.data = 1
  c.mesh.fsdp = -1  # all devices: each has its own rows, and its share of parameters and optimiser state

  c.train.steps = 190_000  # 100 billion tokens
  c.train.log_every = 20
  c.train.eval_every = 1000
  c.train.checkpoint_every = 1000
  return c
