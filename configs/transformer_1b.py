"""The Transformer baseline at the paper's 1.3B size (arXiv:2602.24281, table 6).

    python -m mc_jax.plan --config=configs/transformer_1b.py --topology=v5p:4x4x4
    python -m mc_jax.train --config=configs/transformer_1b.py --workdir=runs/transformer_1b

977,872,896 parameters. A sequence's keys and values take 604 MB.
Planned on v5p:4x4x4, 64 chips, at 16,384 tokens with mesh.model=2 (docs/plan.md, the
compiler's estimate): 3.8 of 95 GiB a chip, 479 ms a step of 0.5M tokens, 1,093,799 tokens per second, MFU 36%.

For a longer context use fewer rows, and more devices per row: --config.data.length=32768
--config.data.batch_size=16 --config.mesh.model=4.
"""

import pathlib
import runpy

_COMMON = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))  # found wherever the program is started


def get_config():
  """The default tree at this size."""
  return _COMMON["transformer"]("1.3B")
