"""The Transformer baseline at the paper's 760M size (arXiv:2602.24281, table 6).

    python -m mc_jax.plan --config=configs/transformer_760m.py --topology=v5p:4x4x4
    python -m mc_jax.train --config=configs/transformer_760m.py --workdir=runs/transformer_760m

729,884,160 parameters. A sequence's keys and values take 604 MB.
Planned on v5p:4x4x4, 64 chips (docs/plan.md, the compiler's estimate): 3.0 of 95 GiB a
chip, 277 ms a step of 0.5M tokens, 1,894,404 tokens per second, MFU 35%.

For a longer context use fewer rows, and more devices per row: --config.data.length=32768
--config.data.batch_size=16 --config.mesh.model=4.
"""

import pathlib
import runpy

_COMMON = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))  # found wherever the program is started


def get_config():
  """The default tree at this size."""
  return _COMMON["transformer"]("760M")
