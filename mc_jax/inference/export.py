"""A model as safetensors and JSON, by plain names, for other programs; and back. docs/export.md lists the names.

A folder holds `config.json`, the fields of ModelConfig, and `model.safetensors`; above a size several
`model-00001-of-00003.safetensors` and `model.safetensors.index.json`, which says where each tensor is. Nothing in it is
run when it is read.
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
from mc_jax.errors import ConfigError
from mc_jax.models import LanguageModel, ModelConfig
from mc_jax.models.config import PARTS, completed, from_stored

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("float32", "bfloat16")
_READ = ("F32", "BF16", "F16")  # in safetensors' spelling: what float32 holds without rounding
_FILE_BYTES = 5_000_000_000  # the usual limit: uploads and file systems dislike larger ones


class Tensor(NamedTuple):
  """A tensor's place in the model.

  Attributes:
    path: of the parameter in the nested dict.
    index: on that parameter's leading axis "layers"; None: it has none.
    axes: a name per axis, inputs first: y = x @ W.
    shape: a size per axis.
  """

  path: tuple[str, ...]
  index: int | None
  axes: tuple[str, ...]
  shape: tuple[int, ...]


def tensors(config: ModelConfig) -> dict[str, Tensor]:
  """Every tensor of a model by its name, such as "blocks.0.mixer.output.kernel"; layer after layer."""
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
  """The folder to write to, of this machine, which need not exist.

  Raises:
    ConfigError: it has something in it, or cannot be a folder.
  """
  path = pathlib.Path(folder)
  if storage.in_bucket(folder):
    raise ConfigError(f"{folder} must be a folder of this machine: copy it to a bucket afterwards")
  if path.exists() and not path.is_dir():
    raise ConfigError(f"{path} is a file: the export needs a folder")
  if path.is_dir() and (names := sorted(entry.name for entry in path.iterdir() if entry.name != lock.FILE)):
    raise ConfigError(f"{path} is not empty, it holds {_some(names)}: export to a new folder")
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

  `config.json` comes last: a folder without it was not finished.

  Args:
    folder: empty or new.
    config: of the model.
    params: nested dict of arrays, blocks stacked on their first axis: TrainState.params.
    dtype: of the tensors, one of DTYPES; bfloat16 is rounded to the nearest.
    file_bytes: of tensors in one file, at most, but that no tensor is divided.
    others: Files to write beside the tensors, {name: content}, such as the tokenizer.

  Returns:
    The files of tensors.

  Raises:
    ConfigError: the folder is not empty, or another dtype.
    OSError: no room, no right to write, or another process exports there.
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
    # Contiguous: safetensors writes the memory as it lies, whatever the strides are.
    values = {name: np.ascontiguousarray(_value(flat, places[name]), kind) for name in names}
    try:
      save_file(values, folder / file)
    except SafetensorError as error:  # which hides what the operating system says
      raise OSError(f"{folder / file} cannot be written: {error}") from error
  if len(files) > 1:
    where = {name: file for file, names in files.items() for name in names}
    _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
  for name, content in others.items():
    (folder / name).write_bytes(content)
  _write_json(folder / CONFIG, dataclasses.asdict(config))
  for file in files:  # safetensors makes files for their owner alone, whatever the umask says
    shutil.copymode(folder / CONFIG, folder / file)
  return [folder / file for file in files]


def load(folder: os.PathLike | str) -> tuple[ModelConfig, dict]:
  """Reads a model that `save` wrote, or another program by the same names.

  Returns:
    The config, and the parameters: nested dict of float32 arrays on the default device, as TrainState.params.

  Raises:
    ConfigError: no such folder or file, one that cannot be read, a field of the config that does not exist or has a
      value that it cannot have, and tensors that are missing, too many, or of another shape or dtype.
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
  """The model that `load` reads, to be called."""
  config, params = load(folder)
  return nnx.merge(_abstract(config)[0], params)


def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
  # Not by nnx.eval_shape, which takes the logical names for axes of the mesh that is set.
  return jax.eval_shape(lambda: nnx.split(LanguageModel(config, rngs=nnx.Rngs(0))))


def _value(flat: Mapping[tuple[str, ...], jax.Array], place: Tensor) -> jax.Array:
  return flat[place.path] if place.index is None else flat[place.path][place.index]


def _files(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
  """Which tensors go to which file, in order."""
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
  """The tensors of a file, each with the file, which is open as long as the stack is."""
  if not path.is_file():
    raise ConfigError(f"{path} is missing: the folder must hold all files that mc_jax.export wrote")
  try:
    file = stack.enter_context(safe_open(path, framework="np"))
  except SafetensorError as error:
    raise ConfigError(f"{path} is not a whole safetensors file: {error}") from error
  return [(name, file) for name in file.keys()]  # noqa: SIM118  (no mapping)


def _differences(places: Mapping[str, Tensor], holders: Mapping[str, safe_open]) -> Iterator[str]:
  """A line for each thing that is not as the config says."""
  if missing := [name for name in places if name not in holders]:
    yield f"  missing: {_some(missing)}"
  if unknown := [name for name in holders if name not in places]:
    yield f"  unknown: {_some(unknown)}"
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
    raise ConfigError(f"{folder} has no {CONFIG}: it must be a folder that mc_jax.export wrote to its end")
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
  path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _some(names: list[str], most: int = 8) -> str:
  """The first names, and how many more there are."""
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
