"""Writes a model as safetensors and JSON for other programs, and reads it back. docs/export.md lists the names.

A folder has `config.json`, the fields of ModelConfig, and `model.safetensors`. Large models have several
`model-00001-of-00003.safetensors`, and `model.safetensors.index.json` with the file of each tensor. Reading a folder
executes nothing in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mc_jax import storage
from mc_jax.data import lock
from mc_jax.errors import ConfigError, listed
from mc_jax.models import LanguageModel, ModelConfig
from mc_jax.models.config import PARTS, completed, from_stored

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("float32", "bfloat16")
_READ = ("F32", "BF16", "F16")  # safetensors' names of dtypes that float32 represents exactly
_FILE_BYTES = 5_000_000_000  # the usual limit of uploads and file systems


class Tensor(NamedTuple):
  """A tensor's place in the model.

  Attributes:
    path: The parameter's path in the nested dict.
    index: The index on that parameter's leading axis "layers"; None: it has none.
    axes: A name per axis, inputs first: y = x @ W.
    shape: A size per axis.
  """

  path: tuple[str, ...]
  index: int | None
  axes: tuple[str, ...]
  shape: tuple[int, ...]


def tensors(config: ModelConfig) -> dict[str, Tensor]:
  """Every tensor of a model by its name, such as "blocks.0.mixer.output.kernel", layer by layer."""
  found = []
  for path, variable in nnx.to_flat_state(_abstract(config)[1]):
    first, *rest = variable.get_metadata("out_sharding")
    if first == "layers":
      # A period of several blocks has its place in the path, which says whose layers are stacked here.
      group, place, inner = (path[0], 0, path[1:]) if config.period == 1 else (path[0], int(path[1]), path[2:])
      for repeat in range(config.repeats):
        name = ".".join((group, str(repeat * config.period + place), *inner))
        found.append((name, Tensor(path, repeat, tuple(rest), variable.shape[1:])))
    else:
      found.append((".".join(path), Tensor(path, None, (first, *rest), variable.shape)))
  return dict(sorted(found, key=lambda item: -1 if item[1].index is None else int(item[0].split(".")[1])))


def require_empty(folder: os.PathLike | str) -> pathlib.Path:
  """The folder to write to, which is on this machine and need not exist.

  Raises:
    ConfigError: It is not empty, or cannot be a folder.
  """
  path = pathlib.Path(folder)
  if storage.in_bucket(folder):
    raise ConfigError(f"{folder} must be a folder of this machine: copy it to a bucket afterwards")
  if path.exists() and not path.is_dir():
    raise ConfigError(f"{path} is a file: the export needs a folder")
  if path.is_dir() and (names := sorted(entry.name for entry in path.iterdir() if entry.name != lock.FILE)):
    raise ConfigError(f"{path} is not empty, it holds {listed(names)}: export to a new folder")
  return path


def save(
  folder: os.PathLike | str,
  config: ModelConfig,
  params: dict,
  *,
  dtype: str = "float32",
  file_bytes: int = _FILE_BYTES,
  others: Mapping[str, bytes] | None = None,
) -> list[pathlib.Path]:
  """Writes a model.

  `config.json` is written last: a folder without it is incomplete.

  Args:
    folder: An empty or new folder.
    config: The model's configuration.
    params: Nested dict of arrays, with blocks stacked on their first axis, as TrainState.params.
    dtype: The tensors' dtype, one of DTYPES; bfloat16 rounds to nearest.
    file_bytes: The largest number of bytes in one file; a single tensor may exceed it.
    others: Other files to write, {name: content}, such as the tokenizer.

  Returns:
    The files of tensors.

  Raises:
    ConfigError: The folder is not empty, or another dtype.
    OSError: There is no room or no permission, or another process exports there.
  """
  if dtype not in DTYPES:
    raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
  with lock.take(require_empty(folder), "exports to", "export to a new folder"):
    return _write(require_empty(folder), config, params, dtype, file_bytes, others or {})


def _write(
  folder: pathlib.Path, config: ModelConfig, params: dict, dtype: str, file_bytes: int, others: Mapping[str, bytes]
) -> list[pathlib.Path]:
  places, flat, kind = tensors(config), traverse_util.flatten_dict(params), jnp.dtype(dtype)
  sizes = {name: math.prod(place.shape) * kind.itemsize for name, place in places.items()}
  files = _files(sizes, file_bytes)
  for file, names in files.items():
    # Contiguous, because safetensors ignores strides.
    values = {name: np.ascontiguousarray(_value(flat, places[name]), kind) for name in names}
    try:
      save_file(values, folder / file)
    except SafetensorError as error:  # which hides the operating system's error
      raise OSError(f"{folder / file} cannot be written: {error}") from error
  if len(files) > 1:
    where = {name: file for file, names in files.items() for name in names}
    _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
  for name, content in others.items():
    (folder / name).write_bytes(content)
  _write_json(folder / CONFIG, dataclasses.asdict(config))
  for file in files:  # safetensors ignores the umask: only the owner could read its files
    shutil.copymode(folder / CONFIG, folder / file)
  return [folder / file for file in files]


def load(folder: os.PathLike | str) -> tuple[ModelConfig, dict]:
  """Reads a model that `save` wrote, or another program with the same names.

  Returns:
    The configuration, and the parameters as a nested dict of float32 arrays on the default device (TrainState.params).

  Raises:
    ConfigError: A folder or file that does not exist or cannot be read; a field that does not exist or has an invalid
      value; tensors that are missing, unknown, or of another shape or dtype.
  """
  folder = pathlib.Path(folder)
  config = _read_config(folder)
  places = tensors(config)
  flat = {}
  with contextlib.ExitStack() as stack:
    holders = {name: file for path in _weights(folder) for name, file in _names(stack, path)}
    if problems := list(_differences(places, holders)):
      raise ConfigError(f"{folder} does not hold the model of its {CONFIG}:\n" + "\n".join(problems))
    for name, place in places.items():
      value = holders[name].get_tensor(name)
      if place.index is None:
        flat[place.path] = value
      else:
        flat.setdefault(place.path, np.empty((config.repeats, *place.shape), np.float32))[place.index] = value
  return config, traverse_util.unflatten_dict({path: jnp.asarray(x, jnp.float32) for path, x in flat.items()})


def load_model(folder: os.PathLike | str) -> LanguageModel:
  """The model of a folder that `save` wrote, see `load`."""
  config, params = load(folder)
  return nnx.merge(_abstract(config)[0], params)


def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
  # Not with nnx.eval_shape, which would take logical names for axes of the current mesh.
  return jax.eval_shape(lambda: nnx.split(LanguageModel(config, rngs=nnx.Rngs(0))))


def _value(flat: Mapping[tuple[str, ...], jax.Array], place: Tensor) -> jax.Array:
  return flat[place.path] if place.index is None else flat[place.path][place.index]


def _files(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
  """{file: names of its tensors}, in order."""
  files, room = [], 0
  for name, size in sizes.items():
    if not files or size > room:
      files.append([])
      room = limit
    files[-1].append(name)
    room -= size
  if len(files) == 1:
    return {WEIGHTS: files[0]}
  return {f"model-{i:05}-of-{len(files):05}.safetensors": names for i, names in enumerate(files, 1)}


def _weights(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of tensors."""
  if not (folder / INDEX).exists():
    return [folder / WEIGHTS]
  where = _read_json(folder / INDEX).get("weight_map")
  if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
    raise ConfigError(f'{folder / INDEX} has no "weight_map" of tensors to files')
  return [folder / pathlib.PurePath(file).name for file in dict.fromkeys(where.values())]


def _names(stack: contextlib.ExitStack, path: pathlib.Path) -> list[tuple[str, safe_open]]:
  """The names of a file's tensors, each with the file, which the stack closes."""
  if not path.is_file():
    raise ConfigError(f"{path} is missing: the folder must hold all files that mc_jax.export wrote")
  try:
    file = stack.enter_context(safe_open(path, framework="np"))
  except SafetensorError as error:
    raise ConfigError(f"{path} is not a whole safetensors file: {error}") from error
  return [(name, file) for name in file.keys()]  # noqa: SIM118  (no mapping)


def _differences(places: Mapping[str, Tensor], holders: Mapping[str, safe_open]) -> Iterator[str]:
  """The differences from the configuration, one line each."""
  if missing := [name for name in places if name not in holders]:
    yield f"  missing: {listed(missing)}"
  if unknown := [name for name in holders if name not in places]:
    yield f"  unknown: {listed(unknown)}"
  for name, place in places.items():
    if name in holders:
      there = holders[name].get_slice(name)
      if (shape := tuple(there.get_shape())) != place.shape:
        yield f"  {name} is {list(shape)} and must be {list(place.shape)}: {', '.join(place.axes)}"
      if (dtype := there.get_dtype()) not in _READ:
        yield f"  {name} is {dtype} and must be one of {', '.join(_READ)}"


def _read_config(folder: pathlib.Path) -> ModelConfig:
  path = folder / CONFIG
  if not path.is_file():
    raise ConfigError(f"{folder} has no {CONFIG}: it must be a folder that mc_jax.export has finished")
  tree = _read_json(path)
  for name in PARTS:
    if not isinstance(part := tree.get(name, {}), dict):
      raise ConfigError(f"{path}: {name} must be an object of fields, got {part!r}")
  tree = completed(tree)
  _require_fields(path, tree, "", ModelConfig)
  for name, kind in PARTS.items():
    _require_fields(path, tree.get(name, {}), f"{name}.", kind)
  config = from_stored(tree)
  try:
    problems = config.problems()
  except TypeError as error:
    raise ConfigError(f"{path} has a value of the wrong type: {error}") from error
  if problems:
    raise ConfigError(f"{path}:\n" + "\n".join(problems))
  return config


def _require_fields(path: pathlib.Path, tree: Iterable[str], prefix: str, kind: type) -> None:
  fields = [field.name for field in dataclasses.fields(kind)]
  if unknown := sorted(set(tree) - set(fields)):
    names = ", ".join(prefix + name for name in unknown)
    raise ConfigError(f"{path} has fields that do not exist: {names}; {kind.__name__} has {', '.join(fields)}")


def _read_json(path: pathlib.Path) -> dict:
  try:
    tree = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ConfigError(f"{path} is not JSON: {error}") from error
  if not isinstance(tree, dict):
    raise ConfigError(f"{path} must hold a JSON object")
  return tree


def _write_json(path: pathlib.Path, tree: dict) -> None:
  storage.write(path, json.dumps(tree, indent=2) + "\n")
