"""Checkpoints: everything that a run needs to resume as if it had never stopped."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import shutil
import sys
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from mc_jax import storage
from mc_jax.data import loader
from mc_jax.data.identity import Identity
from mc_jax.errors import ConfigError
from mc_jax.models.config import COMPUTATION
from mc_jax.training import config as config_lib
from mc_jax.training import distributed
from mc_jax.training.config import Config
from mc_jax.training.state import TrainState

# Create folders before the arrays are handed over: if that fails, nothing waits for them.
ASYNC = ocp.AsyncOptions(create_directories_asynchronously=False)

FOLDER = "checkpoints"
DAMAGED = "damaged"


class Checkpoints:
  """The checkpoints of a workdir: state, the position in the data, and the configuration.

  They do not depend on the mesh or on the number of processes, all of which save and restore together. A checkpoint is
  complete once the digests of its files are beside them; they are written last. The newest is verified here: if it is
  damaged, or a kill left it without digests, it is moved to DAMAGED/ and the one before it is the newest.

  Args:
    workdir: The run's workdir.
    keep: The number of newest checkpoints to keep.
    every: Also keep checkpoints of steps that are multiples of this; 0: none.
    best: Also keep this many checkpoints with the lowest validation losses.

  Raises:
    ConfigError: There are checkpoints and none is intact; nothing was changed.
  """

  def __init__(self, workdir: epath.Path, keep: int, every: int = 0, best: int = 0):
    folder = workdir / FOLDER
    self._folder = storage.absolute(folder)
    _move_damaged(self._folder, workdir / DAMAGED)
    preserved = [policies.LatestN(keep)]
    if every:
      preserved.append(policies.EveryNSteps(every))
    if best:
      preserved.append(policies.BestN(get_metric_fn=_negative, n=best, keep_checkpoints_without_metrics=False))
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(preserved),
        best_fn=_negative if best else None,  # without it Orbax does not store the metrics that the policy needs
        create=True,
        cleanup_tmp_directories=True,
        async_options=ASYNC,
      ),
      item_names=("state", "data", "config"),
    )
    self._best = best
    self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="digests")
    self._completed: concurrent.futures.Future | None = None  # of the last save

  def latest(self) -> int | None:
    """The step of the newest checkpoint."""
    return self._manager.latest_step()

  def save(
    self, step: int, state: TrainState, data: loader.Batches, config: Config, validation: float | None = None
  ) -> None:
    """Saves step `step`, and returns when the arrays are copied; writing continues in the background.

    Args:
      step: The step.
      state: The state after it.
      data: The batches, whose position is saved.
      config: The run's configuration.
      validation: The loss by which the best checkpoints are chosen; None: this is not one of them.

    Raises:
      OSError: There is no room for it, or the previous checkpoint could not be written.
    """
    if step == self.latest():
      return
    self.wait()
    self.require_space(state)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=ocp.args.JsonSave(data.state()),
      config=ocp.args.JsonSave(dataclasses.asdict(config)),
    )
    metrics = {"validation": math.inf if validation is None else validation} if self._best else None
    with self._described_failures():
      self._manager.save(step, args=args, metrics=metrics, force=True)
    self._completed = self._background.submit(self._complete, step)

  def wait(self) -> None:
    """Returns when everything saved so far is complete.

    Raises:
      OSError: It could not be written; older checkpoints are unchanged.
    """
    if self._completed is None:
      return
    completed, self._completed = self._completed, None
    with self._described_failures():
      completed.result()

  def require_space(self, state: TrainState) -> None:
    """Raises OSError if the workdir's file system has no room for a checkpoint; buckets are assumed to have."""
    if storage.in_bucket(self._folder):
      return
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(self._folder).free
    if free < needed:
      room, size = f"{free / 2**20:,.1f} MiB", f"{needed / 2**20:,.1f} MiB"
      raise OSError(f"{self._folder} has room for {room}, and a checkpoint takes {size}; {self._newest()}")

  def restore(self, step: int, target: TrainState, data: loader.Batches) -> TrainState:
    """The state of `step`, with the shapes and shardings of the abstract `target`; moves `data` to its position."""
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(target),
        data=ocp.args.JsonRestore(),
      ),
    )
    data.restore(restored["data"])
    return restored["state"]

  def identity(self, step: int) -> Identity | None:
    """The identity of the data that `step` was trained on; None if the checkpoint does not have it."""
    return identity_of(self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"])

  def config(self, step: int) -> dict:
    """The configuration of `step`, as a nested dict."""
    return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]

  def close(self) -> None:
    """Waits until everything is complete."""
    try:
      self.wait()
    finally:
      self._background.shutdown()
      with contextlib.suppress(OSError, ValueError):  # already reported
        self._manager.close()

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  @contextlib.contextmanager
  def _described_failures(self) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError) as error:  # TensorStore raises ValueErrors
      cause = str(error).strip().partition("\n")[0]
      raise OSError(f"a checkpoint could not be written to {self._folder}; {self._newest()}. {cause}") from error

  def _newest(self) -> str:
    steps = complete(self._folder)
    return f"the newest is that of step {steps[-1]}" if steps else "there is none yet"

  def _complete(self, step: int) -> None:
    """Writes a checkpoint's digests once it is committed."""
    self._manager.wait_until_finished()
    if distributed.is_first():
      storage.write_digests(self._folder / str(step))


def identity_of(data: dict) -> Identity | None:
  """The identity in a checkpoint's data item, see loader.Batches.state; None if it has none."""
  return Identity(**data[loader.IDENTITY]) if loader.IDENTITY in data else None


def complete(folder: epath.Path) -> list[int]:
  """The steps of the complete checkpoints in a workdir's folder FOLDER, ascending; their files may be damaged."""
  return [int(path.name) for path in _all(folder) if storage.has_digests(path)]


def require_intact(checkpoint: epath.Path) -> None:
  """Raises ConfigError, naming the files, if a checkpoint's files are not what was written."""
  if problems := storage.damage(checkpoint):
    raise ConfigError(f"the checkpoint {checkpoint} is damaged:\n" + _listed(problems))


def _move_damaged(folder: epath.Path, aside: epath.Path) -> None:
  """Moves checkpoints newer than the newest intact one away; all processes do this together."""
  damaged: dict[epath.Path, list[str]] = {}
  for checkpoint in reversed(_all(folder)):
    if not storage.has_digests(checkpoint):
      problems = [f"{checkpoint} was not complete when the run ended: it has no {storage.DIGESTS}"]
    else:
      problems = storage.damage(checkpoint, jax.process_index(), jax.process_count())
    if not _in_any_process(bool(problems)):
      break
    damaged[checkpoint] = problems
  else:
    if once_complete := [checkpoint for checkpoint in damaged if storage.has_digests(checkpoint)]:
      listed = _listed([problem for checkpoint in once_complete for problem in damaged[checkpoint]])
      raise ConfigError(
        f"{folder} has no intact checkpoint to resume from:\n{listed}\n"
        "Put a copy in its place, or use another --workdir; nothing was changed"
      )
  for checkpoint, problems in damaged.items():
    if distributed.is_first():
      names = itertools.chain([checkpoint.name], (f"{checkpoint.name}.{i}" for i in itertools.count(1)))
      target = next(aside / name for name in names if not (aside / name).exists())
      aside.mkdir(parents=True, exist_ok=True)
      checkpoint.rename(target)
      print(f"the checkpoint of step {checkpoint.name} is not intact, it was moved to {target}", flush=True)
    if problems:
      print(_listed(problems), file=sys.stderr, flush=True)
  if damaged and jax.process_count() > 1:
    multihost_utils.sync_global_devices("damaged checkpoints are out of the way")


def _all(folder: epath.Path) -> list[epath.Path]:
  """The folders of all checkpoints, complete or not, oldest first."""
  if not folder.exists():
    return []
  return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def _in_any_process(flag: bool) -> bool:
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def _listed(problems: list[str]) -> str:
  shown = problems[:8] + [f"... {len(problems) - 8} more"] * (len(problems) > 8)
  return "\n".join(f"  {problem}" for problem in shown)


def _negative(metrics: dict[str, float]) -> float:
  """The negative loss, which Orbax maximises; a loss that is not finite ranks last."""
  loss = metrics["validation"]
  return -loss if math.isfinite(loss) else -math.inf


# How a model is computed: these may change when a run resumes.
HOW = tuple(f"model.{field}" for field in COMPUTATION)
# How caches are written and read: these may also change when a new run starts from another's parameters.
AGGREGATION = (
  *("model.memory.aggregation", "model.memory.segmentation", "model.memory.segment_length", "model.memory.top_k"),
  *("model.memory.pool", "model.memory.gate", "model.memory.gate_scale", "model.memory.shared_query"),
  "model.memory.after_training",
)


def changed(then: Config, config: Config, workdir: epath.Path) -> dict[str, tuple]:
  """The fields in which a run differs from the checkpoint that it resumes from, {field: (then, now)}.

  Args:
    then: The checkpoint's configuration.
    config: The run's configuration.
    workdir: The checkpoint's workdir, for the error.

  Raises:
    ConfigError: The checkpoint is of another model; the error lists the differences.
  """
  fields = config_lib.differences(then, config)
  unread = {f"model.memory.{name}" for name in then.model.memory.unread.keys() & config.model.memory.unread.keys()}
  model = {name: pair for name, pair in fields.items() if name.startswith("model.") and name not in {*HOW, *unread}}
  if model:
    lines = [f"  {field}: {a!r} in the checkpoint, {b!r} now" for field, (a, b) in model.items()]
    raise ConfigError(
      f"{workdir} holds a checkpoint of another model:\n"
      + "\n".join(lines)
      + "\nUse another --workdir, or the values of the checkpoint; nothing was changed there. (A new run can start "
      "with parameters that were trained under another aggregation: train.start_from)"
    )
  return fields


def require_order(stored: Config, config: Config) -> None:
  """Raises ConfigError, naming the fields, if a run would resume in a different order of rows than the checkpoint's.

  Args:
    stored: The checkpoint's configuration.
    config: The run's configuration.
  """
  then, now = stored.data.order, config.data.order
  if lines := [
    f"  {field}: {then.get(field)!r} in the checkpoint, {now.get(field)!r} now"
    for field in {**then, **now}
    if then.get(field) != now.get(field)
  ]:
    raise ConfigError(
      "the checkpoint's position is in a different order of rows, or other documents were held out for validation:\n"
      + "\n".join(lines)
      + "\nUse another --workdir, or the values of the checkpoint"
    )
