"""The tokenizer that a run keeps in its workdir: what its ids mean, wherever the run is moved."""

from __future__ import annotations

import dataclasses

from etils import epath

from mc_jax import storage
from mc_jax.data import DataConfig, tokenizers
from mc_jax.training.outputs import Outputs


def name(data: DataConfig) -> str | None:
  """What the copy is called; None where there is none, because tokens are bytes or stand for no text."""
  if data.tokenizer == "bytes" or not data.has_text:
    return None
  return "tokenizer.model" if data.tokenizer.endswith(".model") else "tokenizer.json"


def own(workdir: epath.Path, data: DataConfig) -> DataConfig:
  """`data` with the run's copy as the tokenizer; as it is where the run has none."""
  copy = name(data)
  if copy is None or not (workdir / copy).exists():
    return data
  return dataclasses.replace(data, tokenizer=str(workdir / copy))


def available(workdir: epath.Path, data: DataConfig) -> DataConfig:
  """`data`, with the run's copy as the tokenizer where data.tokenizer is gone."""
  if name(data) is None or storage.path(data.tokenizer).exists():
    return data
  found = own(workdir, data)
  if found != data:
    print(f"data.tokenizer={data.tokenizer} is not there: using the run's own copy, {found.tokenizer}")
  return found


def keep(outputs: Outputs, data: DataConfig) -> None:
  """Writes the copy, all or nothing, unless it is there."""
  copy = name(data)
  if copy is None:
    return
  path, content = outputs.folder / copy, tokenizers.read(data.tokenizer)
  if not path.exists() or path.read_bytes() != content:
    storage.write(path, content)
