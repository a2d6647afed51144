"""XLA settings that the programs of this package start with; import before anything computes with JAX.

jaxlib 0.10.2 gives reductions on CPU to a library (YNN) that is slower at them than XLA's own loops; here they are
XLA's. The library gets nothing that XLA would not give it by itself: to let it fuse matrix products made linear
memories faster, and of programs with deep ones and independent segments one in two wrong (tests/xla_flags_test.py). An
unknown flag ends the process, so this one is only set for versions that are known to have it, and not where XLA_FLAGS
has it already.
"""

import importlib.metadata
import os

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_KNOWN = ("0.10.2",)

if importlib.metadata.version("jaxlib") in _KNOWN and _FLAG not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=-LIBRARY_FUSION_TYPE_REDUCE".strip()
