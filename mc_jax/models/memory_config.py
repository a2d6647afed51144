"""What can be turned in Memory Caching layers: model.memory.*."""

from __future__ import annotations

import dataclasses

from mc_jax import memory
from mc_jax.models import forms, problems

# Reading caches without parameters, for models trained without any (arXiv:2602.24281, section 4.3): the average
# of the states' weights, read once; or grm that looks for what it asks (u = q).
AFTER_TRAINING = {
  "moving_average": {"aggregation": "soup", "gate": "uniform"},
  "grm": {"aggregation": "grm", "gate": "softmax", "shared_query": True},
}


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """One layer's memory and how its cached states are read (arXiv:2602.24281)."""

  rule: str = "titans"  # how the memory writes: linear, swla, dla, titans, ...; memory/rules/ lists all
  chunk: int = 64  # tokens written at once; inner gradients are taken at the chunk's start
  depth: int = 2  # dla, titans: layers of the memory's network
  expansion: int = 4  # dla, titans: hidden width of that network, in head_dim
  norm: bool = False  # dla, titans: layer norm on the network's branch
  retention: bool = True  # dla: the memory decays; False is the paper's unbounded form
  normalized: bool = True  # dla, titans: steps are shares of a token's error; False: as printed, of its gradient
  solve: bool | None = None  # titans, normalized: errors see what their chunk wrote; None: if normalized; False: frozen
  max_grad_norm: float | None = None  # dla, titans: clip inner gradients; None: as the rule, 0: no
  max_step: float | None = None  # the largest step size; None: as the rule; 2 of delta rules: eigenvalues down to -1
  window: int = 2  # swla: tokens written at each step
  learned_init: bool | None = None  # recurrences of matrices: M_0 is learned, and starts at 0; None: it is 0

  form: str | None = None  # the layer around the memories: a name in forms.py; None: the rule's own, or memory_caching
  key_dim: int | None = None  # width of a head's queries and keys; None: d_model / heads
  expand_v: float | None = None  # width of a head's values, in widths of a key; None: as the form
  key_heads: int | None = None  # heads of queries and keys, shared by memories; None: as the form (mamba2: 1) or heads
  value_heads: int | None = None  # memories, heads of values and gates; None: model.heads; a multiple of key_heads

  aggregation: str = memory.Options.aggregation  # how cached memories are read: none, residual, grm, soup, ssc
  segmentation: str = "constant"  # constant, or logarithmic (by the powers of two in the length)
  segment_length: int = 256  # tokens between two cached states (segmentation="constant")
  carry: str = memory.Options.carry  # a segment starts from the last state, or "independent" from M_0
  top_k: int = memory.Options.top_k  # ssc: cached memories that a token reads
  dense_steps: int | None = None  # ssc: first training steps, which read all caches; None: a third of them, 0: none
  pool: str = memory.Options.pool  # a segment's summary is the mean or the sum of its keys
  gate: str = memory.Options.gate  # softmax, sigmoid, constant (1), uniform (equal shares), token (blind to segments)
  gate_scale: float = memory.Options.gate_scale  # multiplies the scores before the gate's nonlinearity
  shared_query: bool = False  # u = q instead of a projection of its own: an ablation
  after_training: str | None = None  # moving_average, grm: caches put on a model trained with aggregation="none"
  segment_group: int = memory.Options.segment_group  # carry="independent": segments that run side by side
  read_buffer_mib: int = 256  # mesh.context > 1: what a device gathers at a time to read the others' caches, MiB
  implementation: str | None = memory.Options.implementation  # None: the best for the platform; or xla, reference

  def problems(self, prefix: str = "memory") -> list[str]:
    """Everything wrong with these values, each line naming the field and the valid values."""
    found = [
      *problems.choices(
        prefix,
        self,
        rule=memory.rules.names(),
        form=(None, *forms.FORMS),
        aggregation=tuple(memory.aggregate.AGGREGATIONS),
        segmentation=memory.segments.NAMES,
        carry=memory.CARRIES,
        pool=memory.POOLS,
        gate=memory.GATES,
        after_training=(None, *AFTER_TRAINING),
        implementation=(None, *memory.IMPLEMENTATIONS),
      ),
      *problems.at_least(
        prefix,
        self,
        chunk=1,
        depth=1,
        expansion=1,
        window=2,
        segment_length=1,
        top_k=1,
        dense_steps=0,
        segment_group=1,
        read_buffer_mib=1,
        key_dim=1,
        key_heads=1,
        value_heads=1,
      ),
      *problems.positive(prefix, self, "gate_scale", "max_step", "expand_v"),
      *problems.at_least(prefix, self, max_grad_norm=0),
    ]
    deep = self.rule in memory.rules.names() and "normalized" in memory.rules.options(self.rule)
    if deep and self.solve and not self.normalized:
      found.append(f"{prefix}.solve=True needs {prefix}.normalized=True, got False")
    if deep and self.normalized and (self.max_grad_norm or 0) > 0:
      found.append(
        f"{prefix}.max_grad_norm={self.max_grad_norm} clips the printed rules: it needs {prefix}.normalized=False, for "
        "normalized steps are bounded"
      )
    if not found and self.learned_init is not None and "learned_init" not in memory.rules.options(self.rule):
      learn = [name for name in memory.rules.names() if "learned_init" in memory.rules.options(name)]
      found.append(
        f"{prefix}.learned_init={self.learned_init} has no effect with {prefix}.rule={self.rule!r}: use None, or "
        f"one of {', '.join(learn)} as {prefix}.rule"
      )
    takes = self.rule in memory.rules.names() and "max_step" in memory.rules.options(self.rule)
    if not found and takes and self.max_step is not None and not self._has_max_step:
      found.append(
        f"{prefix}.max_step={self.max_step} has no effect: the step sizes of {prefix}.form={self.form or self.rule!r} "
        f"have no largest one; use max_step=None, or form={forms.DEFAULT!r}"
      )
    if not found and not memory.options.mixable(rule := self.build_rule(), self.as_read().aggregation):
      field = "aggregation" if self.after_training is None else "after_training"
      apart = [name for name in memory.AGGREGATIONS if memory.options.mixable(rule, name)]
      found.append(
        f"{prefix}.{field}={getattr(self, field)!r} adds up the weights of memories, and "
        f"{prefix}.rule={self.rule!r} gives each a scale of its own: use one of {', '.join(apart)} as "
        f"{prefix}.aggregation"
      )
    if self.after_training in AFTER_TRAINING and self.aggregation != "none":
      found.append(
        f"{prefix}.after_training={self.after_training!r} is for models trained with {prefix}.aggregation='none', "
        f"got {self.aggregation!r}: use after_training=None"
      )
    if self.dense_steps and self.selects and self.gate in memory.routing.BLIND:
      sighted = [gate for gate in memory.GATES if gate not in memory.routing.BLIND]
      found.append(
        f"{prefix}.dense_steps={self.dense_steps} has no effect with {prefix}.gate={self.gate!r}, through which scores "
        f"learn nothing: use 0, or one of {', '.join(sighted)} as gate"
      )
    if self.unread:
      gated = [name for name, kind in memory.aggregate.AGGREGATIONS.items() if kind.gated]
      found += [
        f"{prefix}.{field}={value!r} has no effect with {prefix}.aggregation={self.aggregation!r}, which has no gates: "
        f"use {field}={default!r}, or one of {', '.join(gated)} as {prefix}.aggregation"
        for field, default in self.unread.items()
        if (value := getattr(self, field)) != default
      ]
    return found

  @property
  def unread(self) -> dict[str, object]:
    """Fields that nothing reads, with their defaults: those of gates, where the aggregation has none."""
    gated = self._reading is None or self._reading.gated
    return {} if gated or self.after_training is not None else _GATES_ALONE

  @property
  def _has_max_step(self) -> bool:
    """Whether the form makes step sizes that the rule's `max_step` bounds."""
    return not any("eta" in how.makes and not how.bounded for how in forms.of(self).gates)

  @property
  def _reading(self) -> memory.aggregate.Aggregation | None:
    """How memories are read; None if `aggregation` is not a valid name."""
    return memory.aggregate.AGGREGATIONS.get(self.aggregation)

  @property
  def reads_caches(self) -> bool:
    """Whether cached memories are read at all."""
    return self._reading is not None and self._reading.reads_caches

  @property
  def selects(self) -> bool:
    """Whether tokens choose the caches that they read."""
    return self._reading is not None and self._reading.selects

  @property
  def learns_densely(self) -> bool:
    """Whether scores choose caches, so that training does well to begin with reading them all: see `dense`."""
    return self.selects and self._reading.gated and self.gate not in memory.routing.BLIND

  def dense(self) -> MemoryConfig:
    """These values for the first steps of training: every cache is read, weighed by the scores that will choose later.

    What a token does not read teaches its scores nothing, so that ssc alone must first choose right by chance.
    """
    return dataclasses.replace(self, aggregation="grm")

  def as_read(self) -> MemoryConfig:
    """These values with `after_training` in effect: what a layer does. Itself where there is nothing to do."""
    if self.after_training is None:
      return self
    return dataclasses.replace(self, after_training=None, **AFTER_TRAINING[self.after_training])

  def build_rule(self) -> memory.rules.Rule:
    """The rule, made with those of its options that it takes."""
    values = dataclasses.asdict(self)
    taken = [name for name in memory.rules.options(self.rule) if values.get(name) is not None]
    options = {name: values[name] for name in taken}
    if options.get("max_grad_norm") == 0:
      options["max_grad_norm"] = None
    return memory.rules.get(self.rule, **options)

  def build_segmentation(self) -> memory.segments.Segmentation:
    """Where sequences are cut."""
    if self.segmentation == "logarithmic":
      return memory.segments.logarithmic()
    return memory.segments.constant(self.segment_length)

  def build_options(self, kind: type[memory.Options] = memory.Options, **others) -> memory.Options:
    """Options of `memory_caching`, or of decoding, whose kind of options takes `others` as well."""
    names = ("aggregation", "carry", "top_k", "pool", "gate", "gate_scale", "segment_group", "implementation")
    options = {name: getattr(self, name) for name in names}
    return kind(self.build_rule(), self.build_segmentation(), **options, **others)


# What only gates read, with its default. (gate_scale and top_k may stand in a configuration that several aggregations
# share: they are amounts, and without gates there is nothing to scale or choose.)
_GATES_ALONE = {
  field.name: field.default
  for field in dataclasses.fields(MemoryConfig)
  if field.name in ("gate", "pool", "shared_query")
}
