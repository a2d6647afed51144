"""Loads a trained model from a workdir: its configuration, with changes, and its parameters."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util

from mc_jax import storage
from mc_jax.data import identity, tokenizers
from mc_jax.data.identity import Identity
from mc_jax.errors import ConfigError, listed
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.training import config as config_lib
from mc_jax.training import kept, state
from mc_jax.training.checkpointing import FOLDER, complete, identity_of, require_intact
from mc_jax.training.config import Config


@dataclasses.dataclass(frozen=True)
class Trained:
  """The model of a checkpoint, ready for evaluation, generation or export.

  Attributes:
    config: The run's configuration with the overrides; data.tokenizer is the copy in the workdir, if there is one.
    stored: The configuration without the overrides.
    params: Nested dict of float32 arrays, as TrainState.params; `nnx.merge(state.graph(config), params)` is the model.
    step: The checkpoint's step.
    mesh: The mesh that the parameters are on.
    changes: Differences between the parameters and the checkpoint's, one line each; see `scores_may_differ` of `load`.
    identity: The identity of the data that the model was trained on; None if the checkpoint does not have it.
  """

  config: Config
  stored: Config
  params: dict
  step: int
  mesh: jax.sharding.Mesh
  changes: tuple[str, ...] = ()
  identity: Identity | None = None

  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer of the run's text.

    Raises:
      ConfigError: It cannot be read, or is not the one that the model was trained with.
    """
    data = self.config.data
    tokenizer = tokenizers.load(data.tokenizer, data.separator)
    identity.require_tokenizer(self.identity, tokenizer.fingerprint, data.tokenizer)
    return tokenizer

  def tokenizer_file(self) -> dict[str, bytes]:
    """The file of the run's tokenizer, {name: content}; {} if tokens are bytes or stand for no text.

    Raises:
      ConfigError: It cannot be read, or has changed since the run.
    """
    name, where = kept.name(self.stored.data), self.stored.data.tokenizer
    if name is None:
      return {}
    content = tokenizers.read(where)
    if self.identity is not None and hashlib.sha256(content).hexdigest() != self.identity.tokenizer.partition("/")[0]:
      raise ConfigError(f"{where} is not the tokenizer that the model was trained with")
    return {name: content}


def load(
  workdir: epath.PathLike,
  overrides: Mapping[str, object] | None = None,
  *,
  step: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
  scores_may_differ: bool = False,
) -> Trained:
  """Loads the model of a checkpoint, without the optimiser's moments.

  The overrides may change everything that does not affect the parameters: how caches are read, where sequences are cut,
  the dtype, the data, the mesh. The run's own mesh is ignored. With model.memory.after_training, segments have the
  training length and start from M_0 unless model.memory.segment_length and model.memory.carry are given.

  Args:
    workdir: The run's workdir, on this machine or gs://BUCKET/FOLDER.
    overrides: Fields of the configuration that differ from the run's, {"data.length": 2048}.
    step: The checkpoint's step; None: the newest.
    mesh: The mesh for the parameters; None: all devices if the overrides set mesh.*, else the first device.
    scores_may_differ: Whether the overrides may also add and remove the parameters that distinguish caches, connectors
      and age scores. Those that the checkpoint lacks are initialised with train.seed of the overrides.

  Raises:
    ConfigError: A folder, checkpoint or field that does not exist; a damaged checkpoint; settings that do not work
      together; or overrides that change the parameters' names or shapes.
  """
  overrides = dict(overrides or {})
  with _open(epath.Path(workdir)) as manager:
    step = _step(epath.Path(workdir) / FOLDER, step)
    args = ocp.args.Composite(config=ocp.args.JsonRestore(), data=ocp.args.JsonRestore())
    restored = manager.restore(step, args=args)
    stored = config_lib.from_stored(restored["config"])
    stored = dataclasses.replace(stored, mesh=MeshConfig(), data=kept.with_copy(epath.Path(workdir), stored.data))
    config = config_lib.replace(stored, _defaults(stored, overrides) | overrides)
    if new := [problem for problem in config.problems() if problem not in stored.problems()]:
      raise ConfigError("\n".join(new))  # the run itself worked with its problems
    if mesh is None:
      everywhere = any(name.startswith("mesh.") for name in overrides)
      mesh = config.make_mesh(None if everywhere else jax.devices()[:1])
    target = {"params": state.abstract(stored, mesh).params}
    new_scores = _differ_only_in_scores(target["params"], state.abstract(config, mesh).params)
    if not (new_scores and scores_may_differ):
      _require_parameters_of(stored, config, overrides, mesh)
    args = ocp.args.PyTreeRestore(
      item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    params = manager.restore(step, args=ocp.args.Composite(state=args))["state"]["params"]
  changes = ()
  if new_scores:
    params, changes = _merge(params, state.create(config, mesh).params)
  return Trained(config, stored, params, step, mesh, changes, identity_of(restored["data"]))


def _open(workdir: epath.Path) -> ocp.CheckpointManager:
  """The checkpoints of a workdir, read only, because a run may still be writing there."""
  folder = workdir / FOLDER
  if not workdir.is_dir():
    raise ConfigError(f"--workdir={workdir} is not a folder: it must be the workdir of a run of mc_jax.train")
  if not folder.is_dir():
    names = sorted(path.name for path in workdir.iterdir())
    there = f"it holds {listed(names)}" if names else "it is empty"
    raise ConfigError(f"--workdir={workdir} has no folder {FOLDER}/, as runs of mc_jax.train have: {there}")
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # Orbax warns about the consequences of read_only
  try:
    return ocp.CheckpointManager(
      storage.absolute(folder),
      options=ocp.CheckpointManagerOptions(read_only=True),
      item_names=("state", "data", "config"),
    )
  finally:
    logging.set_verbosity(verbosity)


def _step(folder: epath.Path, step: int | None) -> int:
  """The requested step or the newest, of a checkpoint that is complete and undamaged."""
  steps = complete(folder)
  if not steps:
    raise ConfigError(f"{folder} holds no complete checkpoint: did the run reach its first one?")
  there = ", ".join(map(str, steps))
  if step is not None and step not in steps:
    raise ConfigError(f"{folder} has no checkpoint of step {step}: use one of {there}")
  step = steps[-1] if step is None else step
  try:
    require_intact(folder / str(step))
  except ConfigError as error:
    raise ConfigError(f"{error}\nthere are those of step {there}") from error
  return step


def _defaults(stored: Config, overrides: dict) -> dict[str, object]:
  """Further fields that follow from the overrides; the overrides take precedence."""
  if overrides.get("model.memory.after_training") is None:
    return {}
  # Segments as long as in training, each from M_0: on longer rows states that carry over wear out, and their average
  # with them (docs/extrapolation.md).
  return {"model.memory.segment_length": stored.data.length, "model.memory.carry": "independent"}


# Optional parameters that distinguish caches: the projection's last slice, the connectors W_u, and age scores.
_PROJECTION, _PROJECTIONS = ("projection", "kernel"), -3  # the axis of queries, keys, values, output gates, connectors
_AGE_SCORES = ("age_scores", "kernel")


def _differ_only_in_scores(stored: dict, wanted: dict) -> bool:
  """Whether two models' parameters differ, and only in connectors and age scores."""
  stored, wanted = (
    {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()} for tree in (stored, wanted)
  )

  def fits(path: tuple[str, ...]) -> bool:
    if path not in stored or path not in wanted:
      return path[-2:] == _AGE_SCORES
    if path[-2:] == _PROJECTION:
      return np.delete(stored[path], _PROJECTIONS).tolist() == np.delete(wanted[path], _PROJECTIONS).tolist()
    return stored[path] == wanted[path]

  return stored != wanted and all(map(fits, stored | wanted))


def _merge(stored: dict, fresh: dict) -> tuple[dict, tuple[str, ...]]:
  """`stored` with missing parameters taken from `fresh` and superfluous ones dropped; and a line for each."""
  stored, fresh = traverse_util.flatten_dict(stored), traverse_util.flatten_dict(fresh)
  changes = []

  def note(path: tuple[str, ...], name: str, lacking: bool) -> None:
    place = "/".join(path)
    if lacking:
      changes.append(f"the checkpoint has no {name} ({place}): they are initialised with train.seed")
    else:
      changes.append(f"the checkpoint has {name} ({place}): they are left out")

  def joined(old: jax.Array, new: jax.Array) -> jax.Array:
    count = min(x.shape[_PROJECTIONS] for x in (old, new))
    return jnp.concatenate([old[..., :count, :, :], new[..., count:, :, :]], _PROJECTIONS)

  params = {}
  for path, new in fresh.items():
    old = params[path] = stored.get(path, new)
    if old is new:
      note(path, "age scores", lacking=True)
    elif old.shape != new.shape:
      note(path, "connectors", lacking=old.shape < new.shape)
      params[path] = jax.jit(joined, out_shardings=new.sharding)(old, new)
  for path in stored.keys() - fresh.keys():
    note(path, "age scores", lacking=False)
  return traverse_util.unflatten_dict(params), tuple(changes)


def _require_parameters_of(stored: Config, config: Config, overrides: dict, mesh: jax.sharding.Mesh) -> None:
  """Raises ConfigError, naming the fields, if the overrides change the parameters' names or shapes."""

  def shapes(config: Config) -> dict:
    params = state.abstract(config, mesh).params
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

  trained, wanted = shapes(stored), shapes(config)
  if wanted == trained:
    return

  def suffices(name: str) -> bool:  # to change them without the others
    one = config_lib.replace(stored, {name: overrides[name]})
    return not one.problems() and shapes(one) != trained

  differences = config_lib.differences(stored, config)
  changed = {name: differences[name] for name in differences if name.startswith("model.") and name in overrides}
  lines = [
    f"  --config.{name}: {then!r} in the checkpoint, {now!r} requested"
    for name, (then, now) in ({name: changed[name] for name in changed if suffices(name)} or changed).items()
  ]
  path = next(path for path in {**trained, **wanted} if trained.get(path) != wanted.get(path))
  raise ConfigError(
    "the checkpoint has other parameters than a model with\n"
    + "\n".join(lines)
    + f"\nsuch as {path}: {trained.get(path, 'none')} in the checkpoint, {wanted.get(path, 'none')} requested. "
    "Only fields that do not affect the parameters can be changed after training"
  )
