"""How memories write, are cached and read: what `memory_caching` is told besides its arrays."""

import dataclasses

from mc_jax.memory import aggregate, arguments, gates, segments
from mc_jax.memory.rules import Rule

CARRIES = ("checkpoint", "independent")
IMPLEMENTATIONS = ("xla", "pallas", "reference")


@dataclasses.dataclass(frozen=True)
class Options:
  """Fields as `memory_caching` documents them. Static under jit.

  Raises:
    ValueError: an unknown name, a size that is not positive, a rule or a segmentation that is none.
  """

  rule: Rule
  segmentation: segments.Segmentation
  aggregation: str = "grm"
  carry: str = "checkpoint"
  top_k: int = 2
  pool: str = "mean"
  gate: str = "softmax"
  gate_scale: float = 1.0
  segment_group: int = 8
  implementation: str | None = None

  def __post_init__(self):
    if not isinstance(self.rule, Rule):
      raise ValueError(f"rule must come from rules.get, got {self.rule!r}")
    if not isinstance(self.segmentation, segments.Segmentation):
      raise ValueError(
        f"segmentation must be segments.constant(length) or segments.logarithmic(), got {self.segmentation!r}"
      )
    arguments.one_of("aggregation", self.aggregation, aggregate.NAMES)
    arguments.one_of("carry", self.carry, CARRIES)
    arguments.one_of("pool", self.pool, gates.POOLS)
    arguments.one_of("gate", self.gate, gates.NAMES)
    arguments.one_of("implementation", self.implementation, (None, *IMPLEMENTATIONS))
    arguments.at_least_one("top_k", self.top_k)
    arguments.at_least_one("segment_group", self.segment_group)
    if not 0 < self.gate_scale < float("inf"):
      raise ValueError(f"gate_scale must be positive, got {self.gate_scale}")

  @property
  def carries(self) -> bool:
    """Whether a segment starts from the last one's state; if not, from M_0."""
    return self.carry == "checkpoint"
