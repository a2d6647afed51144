"""Checkpoints: everything that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import dataclasses

import orbax.checkpoint as ocp
from etils import epath

from mc_jax.data import ConfigError, loader
from mc_jax.training import config as config_lib
from mc_jax.training import outputs
from mc_jax.training.config import Config
from mc_jax.training.state import TrainState

FOLDER = "checkpoints"


class Checkpoints:
  """The checkpoints of a workdir: state, the position in the data, and the configuration.

  None of them depends on the mesh or on the number of processes, all of which save and restore together.
  """

  def __init__(self, workdir: epath.Path, keep: int):
    folder = workdir / FOLDER
    self._manager = ocp.CheckpointManager(
      folder if outputs.in_bucket(folder) else folder.absolute(),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
      item_names=("state", "data", "config"),
    )

  def latest(self) -> int | None:
    """Step of the newest complete checkpoint."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, data: loader.Batches, config: Config) -> None:
    """Saves step `step`, and returns when the arrays are copied; writing goes on behind."""
    if step == self.latest():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave(data.state()),
        config=ocp.args.JsonSave(dataclasses.asdict(config)),
      ),
      force=True,
    )

  def restore(self, step: int, target: TrainState, data: loader.Batches) -> TrainState:
    """The state of `step`, shaped and placed like the abstract `target`; moves `data` to its position."""
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(target),
        data=ocp.args.JsonRestore(),
      ),
    )
    data.restore(restored["data"])
    return restored["state"]

  def config(self, step: int) -> dict:
    """The configuration that `step` was saved with, as a nested dict."""
    return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]

  def close(self) -> None:
    """Waits until everything is written."""
    self._manager.close()

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_) -> None:
    self.close()


# How a model is computed, not what it is: these may change when a run goes on.
_HOW = ("model.remat", "model.memory.implementation", "model.memory.segment_group", "model.memory.read_buffer_mib")


def changed(stored: dict, config: Config, workdir: epath.Path) -> dict[str, tuple]:
  """Fields in which a run that goes on differs from its checkpoint, {field: (then, now)}.

  Raises:
    ConfigError: the checkpoint is of another model; names what differs.
  """
  then = config_lib.from_dict(stored)
  fields = config_lib.differences(then, config)
  model = {field: values for field, values in fields.items() if field.startswith("model.") and field not in _HOW}
  if model:
    lines = [f"  {field}: {a!r} in the checkpoint, {b!r} now" for field, (a, b) in model.items()]
    raise ConfigError(
      f"{workdir} holds a checkpoint of another model:\n"
      + "\n".join(lines)
      + "\nUse another --workdir, or the values of the checkpoint; nothing was changed there"
    )
  return fields
