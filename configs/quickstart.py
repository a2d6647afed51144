"""A first run: Titans with gated residual memory (grm) on the source of Python's standard library.

    python -m mc_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Needs no download and no accelerator.
"""

from mc_jax.training import config


def get_config():
  c = config.default()
  c.model.d_model = 128
  c.model.layers = 2
  c.model.memory.chunk = 64
  c.model.memory.segment_length = 128
  c.data.length = 256
  c.data.batch_size = 8
  return c
