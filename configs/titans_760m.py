"""Titans with gated residual memory (grm) at the paper's 760M size (arXiv:2602.24281, table 6).

    python -m mc_jax.plan --config=configs/titans_760m.py --topology=v5p:4x4x4
    python -m mc_jax.train --config=configs/titans_760m.py --workdir=runs/titans_760m

873,691,776 parameters. One cached memory of all layers is 56.6 MB in bfloat16,
a sequence's 16 take 906 MB; the keys and values of a Transformer of this size take 604 MB.
Planned on v5p:4x4x4, 64 chips (docs/plan.md, the compiler's estimate): 3.6 of 95 GiB a
chip, 579 ms a step of 0.5M tokens, 905,910 tokens per second, MFU 26%.

The paper's other models are flags: --config.model.memory.rule=dla (or swla, linear) and
--config.model.memory.aggregation=ssc (or soup, residual; none is the base recurrence). For a longer context use
fewer rows, and more devices per row: --config.data.length=32768 --config.data.batch_size=16 --config.mesh.model=4.
"""

import pathlib
import runpy

_COMMON = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))  # found wherever the program is started


def get_config():
  """The default tree at this size."""
  return _COMMON["titans"]("760M")
