"""The identity of a run's data, stored in its checkpoints: digests of the tokenizer and of every file.

Text and JSON lines are read completely at the start anyway, so their digests cover the whole decompressed content. The
digests of Parquet and ArrayRecord files cover the size and both ends, including the footer with the sizes of all parts;
a change that keeps all sizes and both ends goes unnoticed.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np

from mc_jax.data import files, tokenizers
from mc_jax.data.formats import Block, JsonLines, TextFile
from mc_jax.errors import ConfigError, listed

_END = 1 << 16  # bytes at each end of a file
_READ = 4 << 20  # bytes
_THREADS = 16  # files to read at the same time, to hide the latency of buckets
_SHOWN = 4  # most names in a line


@dataclasses.dataclass(frozen=True)
class Identity:
  """The tokenizer and the files of a run's data.

  Attributes:
    tokenizer: The tokenizer's fingerprint, see tokenizers.Tokenizer; None if no source is text.
    files: {source: {file: digest}}, in reading order.
  """

  tokenizer: str | None = None
  files: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

  def to_bytes(self) -> bytes:
    """A serialisation that is equal for equal data."""
    return json.dumps(dataclasses.asdict(self)).encode()


def of_stream(names: Sequence[str], stream: np.ndarray) -> dict[str, str]:
  """{file: digest} of the texts in a stream of sources.load: uint8 [length], a separator before each text."""
  texts = stream.tobytes().split(bytes([tokenizers.SEPARATOR]))[1:]
  return {name: _hash(text).hexdigest() for name, text in zip(names, texts, strict=True)}


def of_blocks(blocks: Iterable[Block]) -> dict[str, str]:
  """{file: digest} of the files of blocks; a name that recurs in another folder is numbered."""
  per_file = list({block.url: block for block in blocks}.values())
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    digests = pool.map(_digest, per_file)
    counts: collections.Counter[str] = collections.Counter()
    by_name = {}
    for block, digest in zip(per_file, digests, strict=True):
      counts[block.name] += 1
      by_name[block.name if counts[block.name] == 1 else f"{block.name} ({counts[block.name]})"] = digest
  return by_name


def of_texts(urls: Mapping[str, str]) -> dict[str, str]:
  """{file: digest} of whole files, given as {file: URL}."""
  return {name: _whole(url) for name, url in urls.items()}


def _digest(block: Block) -> str:
  if isinstance(block, JsonLines):
    return block.digest
  return _whole(block.url) if isinstance(block, TextFile) else _ends(block.url)


def _whole(url: str) -> str:
  digest = _hash()
  with files.reading(url) as file:
    while data := file.read(_READ):
      digest.update(data)
  return digest.hexdigest()


def _ends(url: str) -> str:
  size = files.size(url)
  digest = _hash(str(size).encode())
  for start in (0, max(0, size - _END)):
    with files.reading(url, start) as file:
      digest.update(file.read(_END))
  return digest.hexdigest()


def _hash(data: bytes = b""):
  return hashlib.blake2b(data, digest_size=8)


def require_tokenizer(trained: Identity | None, fingerprint: str | None, where: str) -> None:
  """Raises ConfigError if a tokenizer is not the one that a model was trained with.

  Args:
    trained: The data of the model's run; None, or one without a tokenizer, cannot be compared and passes.
    fingerprint: The fingerprint of the tokenizer to use; None passes.
    where: The tokenizer's path, for the message.
  """
  if trained is None or None in (trained.tokenizer, fingerprint) or trained.tokenizer == fingerprint:
    return
  raise ConfigError(
    f"data.tokenizer={where} is not the tokenizer that the model was trained with (its fingerprint is "
    f"{_short(fingerprint)}, the run's {_short(trained.tokenizer)}): its ids stand for other text. Leave out "
    "--config.data.tokenizer and --config.data.separator to use the run's own"
  )


def resumed(then: Identity | None, now: Identity, allow_growth: bool) -> list[str]:
  """Warnings about the data that a run resumes with; none if they are unchanged.

  Args:
    then: The checkpoint's data; None if it was written by a release that did not store them.
    now: The run's data.
    allow_growth: Whether files may have been added.

  Raises:
    ConfigError: The data are different, or there are more files and `allow_growth` is False.
  """
  if then is None:
    return ["the checkpoint does not record which files and tokenizer it was trained with: they cannot be compared"]
  if lines := list(_differences(then, now)):
    raise ConfigError(
      "the data are not those that the checkpoint was trained on:\n"
      + "\n".join(f"  {line}" for line in lines)
      + "\nPut them back, or train in another --workdir (--config.train.start_from=WORKDIR starts with this run's "
      "parameters)"
    )
  grown = [f"{name} has {_new_files(names)}" for name, names in _added(then, now).items() if names]
  if not grown:
    return []
  warning = (
    f"the data have grown since the checkpoint: {'; '.join(grown)}. From here on rows come in a different order, "
    "documents of this epoch may be read again or not at all, and the validation set has other documents, so its "
    "loss cannot be compared with earlier ones"
  )
  if not allow_growth:
    raise ConfigError(f"{warning}. Remove the new files, or allow them with --config.data.allow_growth=True")
  return [warning]


def unlike(trained: Identity, now: Identity) -> str | None:
  """How the files of sources differ from those that a model was trained on, in one line; None if they do not.

  Only sources that both have are compared.
  """
  without_tokenizers = (dataclasses.replace(identity, tokenizer=None) for identity in (trained, now))
  added = (f"{_new_files(names)} in {source}" for source, names in _added(trained, now).items() if names)
  return "; ".join([*_differences(*without_tokenizers), *added]) or None


def _differences(then: Identity, now: Identity) -> Iterator[str]:
  """Lines for all differences except added files."""
  if then.tokenizer != now.tokenizer:
    yield f"the tokenizer has another fingerprint: {_short(then.tokenizer)} then, {_short(now.tokenizer)} now"
  for name in (name for name in then.files if name in now.files):
    old, new = then.files[name], now.files[name]
    gone = [file for file in old if file not in new]
    added = {digest for file, digest in new.items() if file not in old}
    if gone and {old[file] for file in gone} <= added:
      yield (
        f"{name}: {_of(gone, old, 'has', 'have')} other names, such as {gone[0]}: names are relative to the "
        "folder that all files share, and decide what is held out for validation"
      )
      continue
    if gone:
      yield f"{name}: {_of(gone, old, 'is', 'are')} gone: {listed(gone, _SHOWN)}"
    if changed := [file for file in old if new.get(file, old[file]) != old[file]]:
      yield f"{name}: {_of(changed, old, 'has', 'have')} other contents: {listed(changed, _SHOWN)}"
    if not gone and [file for file in new if file in old] != list(old):
      yield f"{name}: the files are read in another order"


def _added(then: Identity, now: Identity) -> dict[str, list[str]]:
  shared = (name for name in now.files if name in then.files)
  return {name: [file for file in now.files[name] if file not in then.files[name]] for name in shared}


def _of(some: Collection, every: Collection, singular: str, plural: str) -> str:
  """A phrase such as "1 of 6 files is" or "2 of 6 files are"."""
  return f"{len(some)} of {len(every)} files {singular if len(some) == 1 else plural}"


def _new_files(names: list[str]) -> str:
  return f"{len(names)} new file{'s' * (len(names) > 1)} ({listed(names, _SHOWN)})"


def _short(fingerprint: str | None) -> str:
  """The first digits of a fingerprint, with its separator."""
  return "none" if fingerprint is None else re.sub(r"^([0-9a-f]{12})[0-9a-f]*", r"\1", fingerprint)
