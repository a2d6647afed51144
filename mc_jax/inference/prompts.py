"""Saves the cache of a prompt with Orbax and loads it again: the prompt is read once and continued many times."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from mc_jax import storage
from mc_jax.data import lock
from mc_jax.errors import ConfigError
from mc_jax.inference.generation import Decoder, repeat
from mc_jax.models import Cache, CacheConfig
from mc_jax.models import cache as cache_lib
from mc_jax.models.config import COMPUTATION, from_stored


def save(folder: epath.PathLike, decoder: Decoder, logits: jax.Array, cache: Cache) -> None:
  """Saves the results of `decoder.prefill` with the configurations of model and cache and a checksum of the parameters.

  Raises:
    ConfigError: The folder exists.
    OSError: Another process is saving a prompt there.
  """
  folder = storage.absolute(folder)
  record = {
    "model": dataclasses.asdict(decoder.config),
    "cache": dataclasses.asdict(decoder.cache),
    "params": checksum(decoder.params),
    "rows": len(logits),
  }
  name = folder.name
  held = lock.take(folder.parent, f"saves {name} in", "give another --save_prompt", f".{name}.lock")
  with held, _checkpointer() as checkpointer:
    require_new(folder)
    arrays = ocp.args.StandardSave({"logits": logits, "cache": cache})
    checkpointer.save(folder, ocp.args.Composite(prompt=arrays, told=ocp.args.JsonSave(record)))


def require_new(folder: epath.PathLike) -> None:
  """Raises ConfigError if the folder to save a prompt in exists."""
  if epath.Path(folder).exists():
    raise ConfigError(f"{folder} exists already: a saved prompt needs a folder of its own")


def cache_config(folder: epath.PathLike) -> CacheConfig:
  """The configuration of a saved cache, which the decoder that loads it must have.

  Raises:
    ConfigError: The folder has no saved prompt.
  """
  return CacheConfig(**_record(folder)["cache"])


def load(folder: epath.PathLike, decoder: Decoder) -> tuple[jax.Array, Cache]:
  """(logits, cache) for `decoder.generate` to continue, on the decoder's mesh; a single row is repeated to fill it.

  Raises:
    ConfigError: The folder has no saved prompt, or one of another model, other parameters or another cache.
  """
  record = _record(folder)
  models = from_stored(record["model"]), decoder.config
  saved, here = (traverse_util.flatten_dict(dataclasses.asdict(model), sep=".") for model in models)
  differences = [
    f"  model.{field}: {saved[field]!r} then, {value!r} now"
    for field, value in here.items()
    if field not in COMPUTATION and saved[field] != value
  ]
  if not differences and record["params"] != checksum(decoder.params):
    differences.append("  the parameters: their checksums differ (another checkpoint?)")
  if CacheConfig(**record["cache"]) != decoder.cache:
    differences.append(f"  the cache: {record['cache']} then, {dataclasses.asdict(decoder.cache)} now")
  if differences:
    raise ConfigError(f"{folder} was saved by another model than this one:\n" + "\n".join(differences))
  logits, cache = decoder.shapes(record["rows"])
  alone = "pattern" not in record["model"]  # saved when all layers were alike, and their cache in no tuple
  target = {"logits": logits, "cache": cache._replace(layers=cache.layers[0]) if alone else cache}
  with _checkpointer() as checkpointer:
    restored = checkpointer.restore(
      storage.absolute(folder),
      ocp.args.Composite(prompt=ocp.args.StandardRestore(cache_lib.placed(target, decoder.mesh))),
    )
  logits, cache = restored["prompt"]["logits"], restored["prompt"]["cache"]
  cache = cache._replace(layers=(cache.layers,)) if alone else cache
  if len(logits) % decoder.rows == 0:
    return logits, cache
  if len(logits) > 1:
    raise ConfigError(f"{folder} has {len(logits)} rows: the mesh's data x fsdp = {decoder.rows} must divide them")
  return repeat(logits, cache, decoder.rows)


def checksum(params: dict) -> int:
  """A checksum of all bits of all parameters, the same on every mesh."""

  @jax.jit
  def of_leaf(x):
    bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
    index = jax.lax.iota(jnp.uint32, bits.size).reshape(bits.shape)
    return ((bits ^ index) * (2 * index + 1)).sum(dtype=jnp.uint32)  # wraps around, so the order does not matter

  total = 0
  for leaf in jax.tree.leaves(params):
    total = (total * 1_000_003 + int(of_leaf(leaf))) % 2**64
  return total


def _record(folder: epath.PathLike) -> dict:
  folder = epath.Path(folder)
  if not (folder / "told").exists():
    what = "has no saved prompt" if folder.exists() else "does not exist"
    raise ConfigError(f"{folder} {what}: mc_jax.generate saves one with --save_prompt={folder}")
  with _checkpointer() as checkpointer:
    return checkpointer.restore(storage.absolute(folder), ocp.args.Composite(told=ocp.args.JsonRestore()))["told"]


def _checkpointer() -> ocp.Checkpointer:
  return ocp.Checkpointer(ocp.CompositeCheckpointHandler())
