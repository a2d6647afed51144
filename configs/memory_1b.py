"""A Transformer of 1.3B with three memory layers over one table of 1M values (arXiv:2412.09764).

    python -m mc_jax.plan --config=configs/memory_1b.py --topology=v5p:4x4x4
    python -m mc_jax.train --config=configs/memory_1b.py --workdir=runs/memory_1b

24 blocks of d_model 2,048; memory+ layers take the place of the feed-forward networks of blocks 4, 12 and 20, from 0.
Groups of 8 devices (mesh.fsdp) share a table: each has a slice of 256 channels of every value. More values are flags:
--config.model.product_keys.codebook=4096 has 16M, 8192 has 64M; narrower ones
--config.model.product_keys.value_dim=1024.
Memory Caching in the same model: --config.model.pattern=memory,memory,memory,attention.
"""

import pathlib
import runpy

_COMMON = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))  # found wherever the program is started


def get_config():
  """The default tree at this size."""
  c = _COMMON["paper"](layers=24, d_model=2048, heads=16, learning_rate=7e-4, steps=190_000)
  c.model.pattern = ("attention",)
  c.model.feed_forward = ("swiglu",) * 4 + ("product_keys",) + ("swiglu",) * 3
  c.model.product_keys.codebook = 1024
  c.mesh.data = -1
  c.mesh.fsdp = 8
  return c
