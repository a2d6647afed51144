"""The copy of the tokenizer in a run's workdir, so that the run can be moved."""

from __future__ import annotations

import dataclasses

from etils import epath

from mc_jax import storage
from mc_jax.data import DataConfig, tokenizers
from mc_jax.training.outputs import Outputs


def name(data: DataConfig) -> str | None:
  """The copy's name; None if there is none, because tokens are bytes or stand for no text."""
  if data.tokenizer == "bytes" or not data.has_text:
    return None
  return "tokenizer.model" if data.tokenizer.endswith(".model") else "tokenizer.json"


def with_copy(workdir: epath.Path, data: DataConfig) -> DataConfig:
  """`data` with the run's copy as the tokenizer; unchanged if the run has none."""
  copy = name(data)
  if copy is None or not (workdir / copy).exists():
    return data
  return dataclasses.replace(data, tokenizer=str(workdir / copy))


def available(workdir: epath.Path, data: DataConfig) -> DataConfig:
  """`data`, with the run's copy as the tokenizer if data.tokenizer no longer exists."""
  if name(data) is None or storage.path(data.tokenizer).exists():
    return data
  copied = with_copy(workdir, data)
  if copied != data:
    print(f"data.tokenizer={data.tokenizer} does not exist: using the run's own copy, {copied.tokenizer}")
  return copied


def keep(outputs: Outputs, data: DataConfig) -> None:
  """Writes the copy, whole or not at all, unless it is up to date."""
  copy = name(data)
  if copy is None:
    return
  path, content = outputs.folder / copy, tokenizers.read(data.tokenizer)
  if not path.exists() or path.read_bytes() != content:
    storage.write(path, content)
