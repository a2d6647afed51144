"""The whole configuration of a run: one tree, checked at once.

The dataclasses have the fields, their defaults and their meaning. This module converts them to an
`ml_collections.ConfigDict`, which configs/*.py and the command line change, and back.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence

import jax
import ml_collections
from flax import traverse_util

from mc_jax.data import DataConfig, PartConfig, tokenizers
from mc_jax.data.config import TEXTS
from mc_jax.errors import ConfigError
from mc_jax.models import ModelConfig
from mc_jax.models.config import REPLACED, completed, require_registered, with_memories
from mc_jax.models.problems import indivisible
from mc_jax.parallel import axes
from mc_jax.parallel import mesh as meshes
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The length of a run, and what it does besides training."""

  steps: int = 1000  # optimiser steps
  start_from: str = ""  # workdir of another run whose parameters a new run starts with. The two may differ only in how
  # caches are read (checkpointing.AGGREGATION); connectors and age scores that the other lacks are initialised with
  # train.seed. A run that has a checkpoint of its own resumes from that
  microbatches: int = 1  # number of parts of a batch over which gradients are accumulated
  seed: int = 0  # seed of the parameters and of the sample
  max_skipped: int = 5  # consecutive updates that may be skipped (loss or gradient not finite) before the run ends
  hang_minutes: float = 30.0  # minutes without a finished step, evaluation or checkpoint that end the process; 0: never
  log_every: int = 10  # steps between reports
  probe_every: int = (
    0  # steps between looks into the memories (norms, gates, caches read) and at how many values of memory
  )
  # layers are read; 0: none; 10 costs about 1% of the time (docs/stability.md)
  eval_every: int = 100  # steps between evaluations; the last step is always evaluated
  checkpoint_every: int = 200  # steps between checkpoints; the last step always leaves one
  keep_checkpoints: int = 2  # number of newest checkpoints to keep; the second is for when the newest is damaged
  keep_every: int = 0  # also keep checkpoints of steps that are multiples of this; 0: none
  keep_best: int = 0  # also keep this many checkpoints with the lowest validation losses
  sample_length: int = 200  # bytes to generate at the end; 0: none
  sample_temperature: float = 0.8  # temperature of that sample; 0: always the likeliest byte

  def problems(self, prefix: str = "train") -> list[str]:
    """Every setting that cannot work, one line each, naming the field and its valid values."""
    smallest = {
      "steps": 1,
      "microbatches": 1,
      "max_skipped": 1,
      "hang_minutes": 0,
      "log_every": 1,
      "probe_every": 0,
      "eval_every": 1,
      "checkpoint_every": 1,
      "keep_checkpoints": 2,
      "keep_every": 0,
      "keep_best": 0,
      "sample_length": 0,
      "sample_temperature": 0,
      "seed": 0,
    }
    problems = [
      f"{prefix}.{field} must be at least {least}, got {getattr(self, field)!r}"
      for field, least in smallest.items()
      if not getattr(self, field) >= least
    ]
    if not problems and self.keep_every % self.checkpoint_every:
      problems.append(
        f"{prefix}.keep_every must be a multiple of {prefix}.checkpoint_every={self.checkpoint_every}, "
        f"got {self.keep_every}"
      )
    if not problems and self.keep_best and self.checkpoint_every % self.eval_every:
      problems.append(
        f"{prefix}.checkpoint_every must be a multiple of {prefix}.eval_every={self.eval_every} with "
        f"{prefix}.keep_best={self.keep_best}, got {self.checkpoint_every}"
      )
    return problems


@dataclasses.dataclass(frozen=True)
class Config:
  """The configuration of a run."""

  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

  def problems(self) -> list[str]:
    """Every setting of the tree that cannot work, also between its parts; first of all those of a wrong type."""
    if found := _wrong_types(self):
      return found
    data, model, train = self.data, self.model, self.train
    found = [
      *data.problems("data"),
      *model.problems("model"),
      *self.optimizer.problems("optimizer"),
      *train.problems("train"),
      *self.mesh.problems("mesh"),
    ]
    if model.vocab_size < tokenizers.VOCAB_SIZE and data.tokenizer == "bytes" and data.source in TEXTS:
      found.append(f"model.vocab_size={model.vocab_size} must be at least {tokenizers.VOCAB_SIZE}: tokens are bytes")
    if train.microbatches > 1 and data.batch_size % train.microbatches:
      found.append(
        f"train.microbatches={train.microbatches} does not divide "
        f"data.batch_size={data.batch_size}: use one of {_divisors(data.batch_size)}"
      )
    if model.unknown_layers():
      return found
    if train.probe_every and not (model.has_memories or model.has_values):
      found.append(
        f"train.probe_every={train.probe_every} needs memories, a model.pattern with {with_memories()}, or memory "
        f"layers in model.feed_forward; got {','.join(model.pattern)} and {','.join(model.feed_forward)}"
      )
    found += model.data_problems(data.length, data.segments)
    return found

  @property
  def dense_steps(self) -> int:
    """The number of initial steps that read all caches (model.memory.dense_steps); 0 without ssc."""
    if not self.model.learns_densely:
      return 0
    steps = self.model.memory.dense_steps
    return (self.optimizer.decay_steps or self.train.steps) // 3 if steps is None else steps

  def dense(self) -> Config:
    """The configuration of the steps that read all caches."""
    return dataclasses.replace(self, model=dataclasses.replace(self.model, memory=self.model.memory.dense()))

  def of_step(self, step: int) -> Config:
    """The configuration of a step, counted from 1."""
    return self.dense() if step <= self.dense_steps else self

  def check(self) -> Config:
    """Returns self, or raises ConfigError with all the problems at once."""
    problems = self.problems()
    if problems:
      raise ConfigError("\n".join(problems))
    return self

  def check_devices(self, devices: int) -> dict[str, int]:
    """The mesh's sizes on this number of devices, {axis: size}.

    Raises:
      ConfigError: Fields that the mesh does not divide, each with values that would work.
    """
    try:
      sizes = self.mesh.sizes(devices)
    except ValueError as error:
      raise ConfigError(str(error)) from error
    if problems := self._indivisible(sizes):
      raise ConfigError("\n".join(problems))
    return sizes

  def make_mesh(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The run's mesh on these devices; None: all of the job's.

    Raises:
      ConfigError: As `check_devices`, or the mesh does not fit the slices of the devices.
    """
    devices = jax.devices() if devices is None else devices
    self.check_devices(len(devices))
    try:
      return meshes.make(self.mesh, devices)
    except ValueError as error:
      raise ConfigError(str(error)) from error

  def _indivisible(self, sizes: dict[str, int]) -> list[str]:
    """What these sizes of the mesh's axes do not divide, one line each."""
    data, parts = self.data, self.train.microbatches
    rows = data.batch_size // parts
    by_part = f" / train.microbatches={parts} = {rows}" if parts > 1 else ""
    return [
      *indivisible(rows, f"data.batch_size={data.batch_size}{by_part}", sizes, *axes.RULES["batch"]),
      *self.model.mesh_problems(data.length, sizes),
    ]


def default() -> ml_collections.ConfigDict:
  """The default tree, locked: config files and the command line can change fields, and add only to data.sources."""
  tree = _to_config_dict(Config()).lock()
  tree.data.sources.unlock()
  return tree


def source(**fields) -> ml_collections.ConfigDict:
  """A source for `data.sources`: c.data.sources.books = config.source(source="text", paths="books/*.txt", weight=0.3).

  Raises:
    ConfigError: A field that does not exist.
  """
  return _to_config_dict(from_dict(fields, PartConfig)).lock()


def from_config_dict(tree: ml_collections.ConfigDict) -> Config:
  """The dataclasses of a tree that `default` returned."""
  return from_dict(tree.to_dict())


def to_json(config: Config) -> str:
  """The tree as JSON, to be read by people and by `from_dict`."""
  return json.dumps(dataclasses.asdict(config), indent=2)


def from_dict(tree: dict, cls: type = Config):
  """The dataclass `cls` from a nested dict; fields that the dict lacks have their defaults (see `from_stored`).

  Raises:
    ConfigError: A field that does not exist.
  """
  types_of = typing.get_type_hints(cls)
  unknown = sorted(set(tree) - set(types_of))
  if unknown:
    raise ConfigError(f"{cls.__name__} has no field {', '.join(unknown)}; its fields are {', '.join(types_of)}")
  return cls(**{name: _from_tree(value, types_of[name]) for name, value in tree.items()})


def from_stored(tree: dict) -> Config:
  """The configuration in a checkpoint, a dump or a results file, whichever release wrote it."""
  config = from_dict(tree | {"model": completed(tree.get("model", {}))})
  require_registered(config.model)
  return config


def _from_tree(value, kind):
  """A field's value from a tree: a dataclass, a dict of dataclasses under the user's names, or a plain value."""
  if not isinstance(value, dict):
    return value
  if typing.get_origin(kind) is dict:
    return {name: from_dict(item, typing.get_args(kind)[1]) for name, item in value.items()}
  return from_dict(value, kind)


def require_field(name: str) -> None:
  """Raises ConfigError, with the nearest name, if the tree has no field or group `name`."""
  if name.startswith("model.") and (now := REPLACED.get(name.removeprefix("model."))):
    raise ConfigError(f"there is no --config.{name} any more; write {now}")
  names = list(fields(Config()))
  if name.startswith("data.sources."):  # absl checks these names, which the config file chose
    names += [f"data.sources.{name.split('.')[2]}.{field}" for field in fields(PartConfig())]
  groups = {field.rpartition(".")[0] for field in names}
  if name not in names and name not in groups:
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
    group = max((g for g in groups if name.startswith(f"{g}.")), key=len, default=None)
    valid = [field for field in names if field.rpartition(".")[0] == group] if group else groups
    raise ConfigError(
      f"there is no --config.{name}; the nearest field is {nearest}. "
      f"{group or 'The tree'} has {', '.join(sorted(valid))}"
    )


def replaced(message: str) -> str | None:
  """What to write instead of a field of earlier releases, if a config file's error is that it sets one; else None."""
  found = re.search(r'Key "(\w+)" does not exist', message)
  now = found and REPLACED.get(found[1])
  return f"there is no model.{found[1]} any more; write {now}" if now else None


def replace(config: Config, fields: Mapping[str, object]) -> Config:
  """The configuration with other values for some fields, {"model.layers": 2}.

  Raises:
    ConfigError: A field that does not exist, or a group of fields.
  """
  tree = dataclasses.asdict(config)
  for name, value in fields.items():
    require_field(name)
    *groups, field = name.split(".")
    group = functools.reduce(lambda subtree, key: subtree.get(key, {}), groups, tree)
    if isinstance(group.get(field, {}), dict):
      there = ", ".join(group.get(field, {})) or "none here"
      raise ConfigError(f"--config.{name} is a group; change its fields one by one: {there}")
    group[field] = value
  return from_dict(tree)


def fields(config: Config | PartConfig) -> dict[str, object]:
  """Every field's value under names such as "model.layers"."""
  return traverse_util.flatten_dict(dataclasses.asdict(config), sep=".")


def differences(old: Config, new: Config) -> dict[str, tuple]:
  """The fields that differ, {"model.layers": (old value, new value)}."""
  olds, news = fields(old), fields(new)
  return {field: (olds[field], news[field]) for field in news if olds[field] != news[field]}


def _wrong_types(config, prefix: str = "") -> list[str]:
  """Fields of a dataclass, and of those nested in it, whose values do not have the declared type, one line each."""
  problems, types_of = [], typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    name, value, kind = f"{prefix}{field.name}", getattr(config, field.name), types_of[field.name]
    if dataclasses.is_dataclass(kind) and isinstance(value, kind):
      problems += _wrong_types(value, f"{name}.")
    elif typing.get_origin(kind) is dict and isinstance(value, dict):
      for key, item in value.items():
        problems += _wrong_types(item, f"{name}.{key}.")
    elif not _fits(value, kind):
      plain = isinstance(kind, type) and not typing.get_args(kind)
      problems.append(f"{name} must be {kind.__name__ if plain else kind}, got {value!r}")
  return problems


def _fits(value, kind) -> bool:
  if typing.get_origin(kind) is tuple:  # tuple[kind, ...]
    return isinstance(value, tuple) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
  kinds = typing.get_args(kind) or (kind,)
  if isinstance(value, bool):  # a bool is an int in Python
    return bool in kinds
  return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


def _divisors(value: int) -> str:
  return ", ".join(str(n) for n in range(1, value + 1) if value % n == 0)


def _to_config_dict(config) -> ml_collections.ConfigDict:
  types_of = typing.get_type_hints(type(config))
  tree = ml_collections.ConfigDict()
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      tree[field.name] = _to_config_dict(value)
    elif value is None:
      # None or a value of one type: an empty placeholder checks the type of what is assigned to it.
      (kind,) = set(typing.get_args(types_of[field.name])) - {types.NoneType}
      tree[field.name] = ml_collections.config_dict.placeholder(kind)
    else:
      tree[field.name] = value
  return tree
