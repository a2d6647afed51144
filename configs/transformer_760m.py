"""The Transformer baseline at the paper's 760M size (arXiv:2602.24281, table 6).

    python -m mc_jax.plan --config=configs/transformer_760m.py --topology=v5p:4x4x4
    python -m mc_jax.train --config=configs/transformer_760m.py --workdir=runs/transformer_760m

729,884,160 parameters. A sequence's keys and values take 604 MB.
Planned on v5p:4x4x4, 64 chips (docs/plan.md, the compiler's estimate): 3.0 of 95 GiB a
chip, 277 ms a step of 0.5M tokens, 1,894,404 tokens per second, MFU 35%.

For a longer context use fewer rows, and more devices per row: --config.data.length=32768
--config.data.batch_size=16 --config.mesh.model=4.
"""

from mc_jax.training import config


def get_config():
  """The default tree at this size."""
  c = config.default()

  c.model.vocab_size = 32_768  # the paper's 32k; a power of two, so that any mesh.model divides it into whole tiles
  c.model.layers = 24
  c.model.d_model = 1536
  c.model.heads = 16
  c.model.dtype = "bfloat16"
  c.model.remat = "full"
  c.model.mixer = "transformer"

  c.data.source = "text"  # as bytes; docs/data.md explains sources, tokenizers and packing
  c.data.paths = "corpus/**"
  c.data.length = 4096
  c.data.batch_size = 128  # rows in a step: 0.5M tokens

  c.optimizer.learning_rate = 1.25e-3
  c.optimizer.weight_decay = 0.1
  c.optimizer.warmup_steps = 1000

  c.mesh.data = 1
  c.mesh.fsdp = -1  # all devices: each has its own rows, and its share of parameters and optimiser state

  c.train.steps = 57_000  # 30 billion tokens
  c.train.log_every = 20
  c.train.eval_every = 1000
  c.train.checkpoint_every = 1000
  return c
