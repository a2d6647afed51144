"""Prompts that are read once and continued many times: a cache, saved with Orbax and loaded again."""

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
from mc_jax.models.config import from_stored

# How a model is computed, not what it is.
_HOW = ("remat", "memory.implementation", "memory.segment_group", "memory.read_buffer_mib", "memory.dense_steps")


def save(folder: epath.PathLike, decoder: Decoder, logits: jax.Array, cache: Cache) -> None:
  """Saves what `decoder.prefill` gave, with the model's and the cache's settings and a checksum of the parameters.

  Raises:
    ConfigError: the folder is there already.
    OSError: another process saves a prompt there.
  """
  folder = storage.absolute(folder)
  told = {
    "model": dataclasses.asdict(decoder.config),
    "cache": dataclasses.asdict(decoder.cache),
    "params": checksum(decoder.params),
    "rows": len(logits),
  }
  name = folder.name
  own = lock.take(folder.parent, f"saves {name} in", "give another --save_prompt", f".{name}.lock")
  with own, _checkpointer() as checkpointer:
    require_new(folder)
    arrays = ocp.args.StandardSave({"logits": logits, "cache": cache})
    checkpointer.save(folder, ocp.args.Composite(prompt=arrays, told=ocp.args.JsonSave(told)))


def require_new(folder: epath.PathLike) -> None:
  """Raises ConfigError if there is something where a prompt is to be saved."""
  if epath.Path(folder).exists():
    raise ConfigError(f"{folder} is there already: a saved prompt needs a folder of its own")


def cache_config(folder: epath.PathLike) -> CacheConfig:
  """What a saved cache was made for: what the decoder that loads it must have.

  Raises:
    ConfigError: nothing was saved there.
  """
  return CacheConfig(**_told(folder)["cache"])


def load(folder: epath.PathLike, decoder: Decoder) -> tuple[jax.Array, Cache]:
  """(logits, cache), to go on from with `decoder.generate`; on the decoder's mesh, one row repeated to fill it.

  Raises:
    ConfigError: nothing was saved there, or by another model, with other parameters or for another cache.
  """
  told = _told(folder)
  models = from_stored(told["model"]), decoder.config
  saved, here = (traverse_util.flatten_dict(dataclasses.asdict(model), sep=".") for model in models)
  found = [
    f"  model.{field}: {saved[field]!r} then, {value!r} now"
    for field, value in here.items()
    if field not in _HOW and saved[field] != value
  ]
  if not found and told["params"] != checksum(decoder.params):
    found.append("  the parameters: their checksums differ (another checkpoint?)")
  if CacheConfig(**told["cache"]) != decoder.cache:
    found.append(f"  the cache: {told['cache']} then, {dataclasses.asdict(decoder.cache)} now")
  if found:
    raise ConfigError(f"{folder} was saved by another model than this one:\n" + "\n".join(found))
  logits, cache = decoder.shapes(told["rows"])
  alone = "pattern" not in told["model"]  # saved when all layers were alike, and their cache in no tuple
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
  """Of all bits of all parameters: the same on every mesh."""

  @jax.jit
  def of_leaf(x):
    bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
    place = jax.lax.iota(jnp.uint32, bits.size).reshape(bits.shape)
    return ((bits ^ place) * (2 * place + 1)).sum(dtype=jnp.uint32)  # wraps around, in whatever order it is added up

  total = 0
  for leaf in jax.tree.leaves(params):
    total = (total * 1_000_003 + int(of_leaf(leaf))) % 2**64
  return total


def _told(folder: epath.PathLike) -> dict:
  folder = epath.Path(folder)
  if not (folder / "told").exists():
    what = "has no saved prompt in it" if folder.exists() else "is not there"
    raise ConfigError(f"{folder} {what}: mc_jax.generate saves one with --save_prompt={folder}")
  with _checkpointer() as checkpointer:
    return checkpointer.restore(storage.absolute(folder), ocp.args.Composite(told=ocp.args.JsonRestore()))["told"]


def _checkpointer() -> ocp.Checkpointer:
  return ocp.Checkpointer(ocp.CompositeCheckpointHandler())
