"""AdamW with linear warmup, cosine decay and clipping by the norm; values of memory layers are a group of their own."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

VALUES = "values"  # what a table of values is called in its module


@dataclasses.dataclass(frozen=True)
class ValuesConfig:
  """What is different for the values of memory layers (model.feed_forward=product_keys), on the same schedule."""

  learning_rate: float | None = None  # peak; None: optimizer.learning_rate
  weight_decay: float = 0.1  # multiplied by their learning rate
  clip_norm: float = 1.0  # largest norm of their gradient, scaled down if above, apart from the rest's; 0: no clipping
  lazy: bool = False  # rows that a step did not read keep value and moments; False: all decay, and move by old moments

  def problems(self, prefix: str = "optimizer.memory_values") -> list[str]:
    """Every setting that cannot work, one line each, naming the field and its valid values."""
    found = []
    if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
      found.append(f"{prefix}.learning_rate must be positive, got {self.learning_rate!r}")
    if not self.weight_decay >= 0:
      found.append(f"{prefix}.weight_decay must be at least 0, got {self.weight_decay!r}")
    if not self.clip_norm >= 0:
      found.append(f"{prefix}.clip_norm must be positive, or 0 for no clipping, got {self.clip_norm!r}")
    return found


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW (arXiv:1711.05101), its schedule and its clipping."""

  learning_rate: float = 2e-3  # peak, at the end of the warmup
  warmup_steps: int = 50  # steps of linear warmup from 0
  final_fraction: float = 0.1  # final learning rate as a fraction of the peak, reached by a cosine at decay_steps
  decay_steps: int = 0  # step at which the cosine ends and the rate becomes constant; 0: train.steps
  beta1: float = 0.9  # decay of the gradient's running mean
  beta2: float = 0.95  # decay of the gradient's running mean square
  epsilon: float = 1e-8
  weight_decay: float = 0.1  # multiplied by the learning rate; applies to the weights selected by `decayed`
  clip_norm: float = 1.0  # largest global norm of the gradient, scaled down if above; 0: no clipping
  memory_values: ValuesConfig = dataclasses.field(default_factory=ValuesConfig)

  def problems(self, prefix: str = "optimizer") -> list[str]:
    """Every setting that cannot work, one line each, naming the field and its valid values."""
    problems = []

    def require(condition: bool, field: str, valid: str) -> None:
      if not condition:
        problems.append(f"{prefix}.{field} must be {valid}, got {getattr(self, field)!r}")

    require(0 < self.learning_rate < float("inf"), "learning_rate", "positive")
    require(self.warmup_steps >= 0, "warmup_steps", "at least 0")
    require(0 <= self.final_fraction <= 1, "final_fraction", "between 0 and 1")
    require(self.decay_steps >= 0, "decay_steps", "at least 1, or 0 for train.steps")
    require(0 <= self.beta1 < 1, "beta1", "at least 0 and below 1")
    require(0 <= self.beta2 < 1, "beta2", "at least 0 and below 1")
    require(self.epsilon > 0, "epsilon", "positive")
    require(self.weight_decay >= 0, "weight_decay", "at least 0")
    require(self.clip_norm >= 0, "clip_norm", "positive, or 0 for no clipping")
    return problems + self.memory_values.problems(f"{prefix}.memory_values")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate of update 0, 1, ...: linear to the peak, then a cosine to its final fraction.

  Update t of W warmup steps has peak * (t + 1) / W, so that the first one counts. The cosine ends at update
  `decay_steps`, or at `steps` if that is 0; runs shorter than their warmup only warm up.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  end = config.decay_steps or steps
  cosine = optax.cosine_decay_schedule(peak, max(end - warmup, 1), config.final_fraction)
  if not warmup:
    return cosine
  ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([ramp, cosine], [warmup])


def schedule_changes(then: OptimizerConfig, then_steps: int, now: OptimizerConfig, steps: int, done: int) -> list[str]:
  """Lines about a change of the next learning rate in a run that resumes; none if it does not change.

  Args:
    then: The settings that the run had.
    then_steps: The train.steps that it had.
    now: The settings that it resumes with.
    steps: The train.steps that it resumes with.
    done: The number of updates so far.
  """
  expected, rate = (float(schedule(*at)(done)) for at in ((then, then_steps), (now, steps)))
  if done >= steps or math.isclose(rate, expected, rel_tol=1e-3):
    return []
  ended, end = then.decay_steps or then_steps, now.decay_steps or steps
  line = f"the learning rate of step {done + 1} is {rate:.3g}; in the earlier schedule it was {expected:.3g}"
  if end != ended:
    line += f", whose cosine ended at step {ended} and now ends at step {end}"
  if end != ended and done >= ended:
    return [line, f"to keep the decay finished: --config.optimizer.decay_steps={ended}"]
  return [line]


# Modules of models/ whose kernels set time scales or make choices.
_NOT_DECAYED = ("_convolution", "token_gates", "age_scores")


def decayed(params: dict) -> dict:
  """The parameters with weight decay: only the kernels of the projections.

  Excluded are the embedding, norms and biases, and parameters that set time scales or initial states: the gates' maps,
  the short convolution, a memory's M_0. Parameters are chosen by name, because stacked layers add an axis to every
  array.

  Args:
    params: Nested dict of arrays.

  Returns:
    The same tree with bools.
  """

  def decays(path, _) -> bool:
    names = [str(key.key) for key in path]
    return names[-1] == "kernel" and not any(name.endswith(_NOT_DECAYED) for name in names)

  return jax.tree_util.tree_map_with_path(decays, params)


def adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """The optimiser of a run of `steps` updates.

  Tables of values have a rate, a decay and a clip of their own (`ValuesConfig`); the state is that of AdamW.
  """
  optimizer = optax.chain(
    _clip(config),
    optax.chain(  # as optax.adamw
      optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
      _decay(config),
      optax.scale_by_learning_rate(schedule(config, steps)),
    ),
  )
  return _lazy(optimizer) if config.memory_values.lazy else optimizer


def _is_values(path) -> bool:
  keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
  return bool(keys) and keys[-1] == VALUES


def _clip(config: OptimizerConfig) -> optax.GradientTransformation:
  """Clips the values' gradient by its norm, and that of all others by theirs."""

  def clip(updates, _):
    flat = traverse_util.flatten_dict(updates)
    values = {path: update for path, update in flat.items() if path[-1] == VALUES}
    others = {path: update for path, update in flat.items() if path not in values}
    for group, norm in ((values, config.memory_values.clip_norm), (others, config.clip_norm)):
      if group and norm:
        group |= optax.clip_by_global_norm(norm).update(group, optax.EmptyState())[0]
    return traverse_util.unflatten_dict(values | others)

  return optax.stateless(clip)


def _decay(config: OptimizerConfig) -> optax.GradientTransformation:
  """Adds what decays, and gives the values their rate in units of the others'."""
  decay = optax.add_decayed_weights(config.weight_decay, mask=decayed)
  own = config.memory_values
  ratio = 1.0 if own.learning_rate is None else own.learning_rate / config.learning_rate

  def of_values(path, update, param):
    return ratio * (update + own.weight_decay * param) if _is_values(path) else update

  def update(updates, state, params=None):
    updates, state = decay.update(updates, state, params)
    return jax.tree_util.tree_map_with_path(of_values, updates, params), state

  return optax.GradientTransformation(decay.init, update)


def _lazy(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Rows of values whose gradient is 0, as that of rows is that no token read, keep what they have.

  Their moments stay too, so that a row moves as if the steps that did not read it had not been; the corrections of
  Adam's moments alone count all steps. The table is passed through once a step all the same.
  """

  def update(updates, state, params=None):
    flat = jax.tree_util.tree_leaves_with_path(updates)
    read = {_keys(path): jnp.any(leaf != 0, -1, keepdims=True) for path, leaf in flat if _is_values(path)}

    def keep(path, new, old):
      return jnp.where(read[_keys(path)], new, old) if _is_values(path) else new

    moved, after = optimizer.update(updates, state, params)
    moved = jax.tree_util.tree_map_with_path(lambda path, new: keep(path, new, jnp.zeros_like(new)), moved)
    return moved, jax.tree_util.tree_map_with_path(keep, after, state)

  return optax.GradientTransformation(optimizer.init, update)


def _keys(path) -> tuple[str, ...]:
  """The names of a parameter on the way to it, or to its moments."""
  return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
