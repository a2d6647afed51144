"""Gated DeltaNet with gated residual memory (grm), of the paper's 1.3B size (arXiv:2412.06464, 2602.24281).

    python -m mc_jax.plan --config=configs/gated_deltanet_1b.py --topology=v5p:4x4x4
    python -m mc_jax.train --config=configs/gated_deltanet_1b.py --workdir=runs/gated_deltanet_1b

1,356,613,920 parameters: 18 layers of 8 heads with keys of 256 and values of 512 channels, as published. Other
recurrences are flags, each with its published layer: --config.model.memory.rule=kda (or mamba2, gla, mlstm, ...), and
so is Memory Caching: --config.model.memory.aggregation=ssc (none is Gated DeltaNet itself). docs/plan.md has the plans.
"""

import pathlib
import runpy

_COMMON = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))  # found wherever the program is started


def get_config():
  """The default tree at this size."""
  return _COMMON["gated_deltanet"]("1.3B")
