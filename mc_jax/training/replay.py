"""Dumps the step that ended a run with everything it needs, and runs it again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mc_jax import storage
from mc_jax.data import windows
from mc_jax.errors import ConfigError, listed
from mc_jax.parallel import axes
from mc_jax.training import config as config_lib
from mc_jax.training import distributed, report, state
from mc_jax.training.checkpointing import changed, require_intact
from mc_jax.training.config import Config
from mc_jax.training.state import TrainState
from mc_jax.training.step import Batch, token_losses

FOLDER = "replay"
_CONFIG = "config.json"


def dump(workdir: epath.Path, step: int, current: TrainState, batch: Batch, config: Config) -> str:
  """Writes the state and batch of `step` to `workdir`/replay/STEP; all processes call this together.

  Returns:
    A sentence with the folder, or with the reason why it could not be written: that must not hide the step's own error.
  """
  folder = _folder(workdir, step)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
      checkpointer.save(folder / "arrays", args=ocp.args.StandardSave({"state": current, "batch": batch}), force=True)
    if distributed.is_first():
      (folder / _CONFIG).write_text(config_lib.to_json(config), encoding="utf-8")
      storage.write_digests(folder)
  except (OSError, ValueError) as error:  # TensorStore raises ValueErrors
    return f"Its state and batch could not be written to {folder}: {str(error).strip().splitlines()[0]}"
  return f"Its state and batch are in {folder}: the same command with --replay={step} shows where it comes from"


def replay(config: Config, workdir: epath.PathLike, step: int, devices: Sequence[jax.Device] | None = None) -> str:
  """Runs a dumped step again, without its update.

  Args:
    config: The run's configuration; it may differ from the dump's where a resumed run's may. The dump's data are used.
    workdir: The run's workdir.
    step: The step that was dumped.
    devices: The devices of config.mesh; None: all of the job's.

  Returns:
    A table of what is not finite: parameters, losses of the batch's rows, gradients.

  Raises:
    ConfigError: There is no intact dump of the step, or it is of another model.
  """
  folder = _folder(epath.Path(workdir), step)
  if not storage.has_digests(folder):
    there = sorted(path.name for path in folder.parent.iterdir()) if folder.parent.exists() else []
    raise ConfigError(f"--replay={step}: {folder} holds no dump of a step; there are {', '.join(there) or 'none'}")
  require_intact(folder)
  stored = config_lib.from_stored(json.loads((folder / _CONFIG).read_text(encoding="utf-8")))
  changed(stored, config, folder)
  config = dataclasses.replace(config, data=stored.data)
  mesh = config.check().make_mesh(devices)
  target = {"state": state.abstract(config, mesh), "batch": windows.shapes(config.data, mesh)}
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
    restored = checkpointer.restore(folder / "arrays", args=ocp.args.StandardRestore(target))
  params, batch = restored["state"].params, restored["batch"]
  graph = state.graph(config.of_step(step))

  def examine(params: dict, batch: Batch) -> dict:
    def loss(params: dict) -> tuple[jax.Array, jax.Array]:
      losses = token_losses(graph, params, batch)
      return losses.sum() / jnp.maximum(batch["weights"].sum(), 1.0), losses.sum(axis=1)

    (mean, rows), grads = jax.value_and_grad(loss, has_aux=True)(params)
    squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g)), grads)
    finite = jax.tree.map(lambda p: jnp.isfinite(p).all(), params)
    return {"loss": mean, "rows": rows, "squares": squares, "finite": finite}

  with jax.set_mesh(mesh):
    values = jax.device_get(jax.jit(examine, out_shardings=axes.sharding(mesh, ()))(params, batch))
  squares, finite = _by_name(values["squares"]), _by_name(values["finite"])
  rows = [f"row {i} of {len(values['rows'])}" for i in np.flatnonzero(~np.isfinite(values["rows"]))]
  return report.table(
    {
      "loss": f"{values['loss']:.6g} nats",
      "gradient's norm": f"{np.sqrt(sum(squares.values())):.6g}",
      "losses not finite": listed(rows) or "none",
      "parameters not finite": listed([name for name, good in finite.items() if not good]) or "none",
      "gradients not finite": listed([name for name, square in squares.items() if not np.isfinite(square)]) or "none",
    },
    f"step {step}, again",
  )


def _folder(workdir: epath.Path, step: int) -> epath.Path:
  return storage.absolute(workdir / FOLDER / str(step))


def _by_name(tree: dict) -> dict[str, np.ndarray]:
  """A nested dict's leaves under names such as "blocks.mixer.norm.scale"."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
