"""How memories write, are cached and read: what `memory_caching` is told besides its arrays."""

import dataclasses

from mc_jax.memory import aggregate, routing, segments
from mc_jax.memory.rules import Rule

CARRIES = ("checkpoint", "independent")
IMPLEMENTATIONS = ("xla", "pallas", "reference")


@dataclasses.dataclass(frozen=True)
class Options:
  """How the memories of a layer write, are cached and read. Static under jit.

  Attributes:
    rule: how a memory writes, from rules.get.
    segmentation: where memories are cached, segments.constant(length) or segments.logarithmic().
    aggregation: how caches are read: "none" (not at all), "residual" (Eq. 7), "grm" (Eq. 9), "soup" (Eq. 14), "ssc"
      (Eq. 17).
    carry: "checkpoint": a segment starts from the last one's state; "independent": from M_0.
    top_k: caches that a token reads under ssc, at most.
    pool: how keys make a segment's summary, "mean" (Eq. 10) or "sum" (Eq. 16).
    gate: "softmax", "sigmoid", "constant" (1), "uniform" (equal shares of what is visible) or "token" (by token_scores,
      blind to what the segments hold).
    gate_scale: multiplies the scores.
    segment_group: independent segments that run side by side; more is faster and takes more memory.
    implementation: None (the best for the platform: kernels where it is compiled for TPUs and they support it), "xla",
      "pallas" (the kernels or an error; off TPU interpreted, for tests), or "reference" (token by token, slow).

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
    one_of("aggregation", self.aggregation, tuple(aggregate.AGGREGATIONS))
    if not mixable(self.rule, self.aggregation):
      others = [name for name in aggregate.AGGREGATIONS if mixable(self.rule, name)]
      raise ValueError(
        f"aggregation={self.aggregation!r} adds up the weights of memories, and rule {self.rule.name!r} gives "
        f"each memory a scale of its own: use {', '.join(others)}"
      )
    one_of("carry", self.carry, CARRIES)
    one_of("pool", self.pool, routing.POOLS)
    one_of("gate", self.gate, routing.NAMES)
    one_of("implementation", self.implementation, (None, *IMPLEMENTATIONS))
    at_least_one("top_k", self.top_k)
    at_least_one("segment_group", self.segment_group)
    if not 0 < self.gate_scale < float("inf"):
      raise ValueError(f"gate_scale must be positive, got {self.gate_scale}")

  @property
  def carries(self) -> bool:
    """Whether a segment starts from the last one's state; if not, from M_0."""
    return self.carry == "checkpoint"


def mixable(rule: Rule, aggregation: str) -> bool:
  """Whether an aggregation can read the memories of a rule: not by adding up weights that have scales of their own."""
  return rule.mixes or not aggregate.AGGREGATIONS[aggregation].mixes


def one_of(name: str, value: object, valid: tuple) -> None:
  """Raises ValueError, listing the valid values, unless value is one of them."""
  if value not in valid:
    raise ValueError(f"{name} must be one of {', '.join(map(str, valid))}; got {value!r}")


def at_least_one(name: str, value: int) -> None:
  """Raises ValueError unless value >= 1."""
  if not isinstance(value, int) or value < 1:
    raise ValueError(f"{name} must be at least 1, got {value!r}")
