"""What a run reads, as its checkpoints remember it: a tokenizer and files, each by a digest.

Text and JSON lines are read at the start anyway: their digest is of the whole content, decompressed. That of Parquet
and ArrayRecord is of the size and both ends of the file, which include the footer with the sizes of all parts: a change
that leaves every size and both ends as they were goes unnoticed.
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
_THREADS = 16  # files that are read at the same time: those in buckets have their latency
_SHOWN = 4  # names in a line


@dataclasses.dataclass(frozen=True)
class Identity:
  """The tokenizer and the files of a run's data.

  Attributes:
    tokenizer: The fingerprint, see tokenizers.Tokenizer; None where no source is text.
    files: {source: {file: digest}}, in the order in which they are read.
  """

  tokenizer: str | None = None
  files: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

  def to_bytes(self) -> bytes:
    """Equal bytes, equal data."""
    return json.dumps(dataclasses.asdict(self)).encode()


def of_stream(names: Sequence[str], stream: np.ndarray) -> dict[str, str]:
  """{file: digest} of texts that were joined: bytes [length] with a separator before each, as of sources.load."""
  texts = stream.tobytes().split(bytes([tokenizers.SEPARATOR]))[1:]
  return {name: _hash(text).hexdigest() for name, text in zip(names, texts, strict=True)}


def of_blocks(blocks: Iterable[Block]) -> dict[str, str]:
  """{file: digest} of the files that blocks are in; a name that occurs again, in another folder, has its number."""
  of_files = list({block.url: block for block in blocks}.values())
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    digests = pool.map(_digest, of_files)
    counts: collections.Counter[str] = collections.Counter()
    found = {}
    for block, digest in zip(of_files, digests, strict=True):
      counts[block.name] += 1
      found[block.name if counts[block.name] == 1 else f"{block.name} ({counts[block.name]})"] = digest
  return found


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
  """Raises ConfigError if ids of this tokenizer are not those that a model was trained on; None cannot be compared.

  Args:
    trained: The data of the model's run.
    fingerprint: Of the tokenizer that is to be used.
    where: It lies, for the message.
  """
  if trained is None or None in (trained.tokenizer, fingerprint) or trained.tokenizer == fingerprint:
    return
  raise ConfigError(
    f"data.tokenizer={where} is not the tokenizer that the model was trained with (its fingerprint is "
    f"{_short(fingerprint)}, the run's {_short(trained.tokenizer)}): its ids stand for other text. Leave out "
    "--config.data.tokenizer and --config.data.separator, which takes the run's own"
  )


def resumed(then: Identity | None, now: Identity, allow_growth: bool) -> list[str]:
  """Lines about the data that a run resumes on; none if they are the checkpoint's.

  Args:
    then: Of the checkpoint; None: it was written before there was such a thing.
    now: Of the run.
    allow_growth: Whether there may be more files than then.

  Raises:
    ConfigError: Other data, or more of them without `allow_growth`.
  """
  if then is None:
    return ["the checkpoint does not say which files and which tokenizer it was trained on: they cannot be compared"]
  if found := list(_differences(then, now)):
    raise ConfigError(
      "the data are not those that the checkpoint was trained on:\n"
      + "\n".join(f"  {line}" for line in found)
      + "\nPut them back, or train in another --workdir (--config.train.start_from=WORKDIR starts with this run's "
      "parameters)"
    )
  grown = [f"{name} has {_some(more)}" for name, more in _added(then, now).items() if more]
  if not grown:
    return []
  what = (
    f"the data have grown since the checkpoint: {'; '.join(grown)}. The rows come in another order from here on, "
    "documents of this epoch may be read again or not at all, and the validation set has other documents, so that its "
    "loss is not comparable with earlier ones"
  )
  if not allow_growth:
    raise ConfigError(f"{what}. Take the new files out, or allow it with --config.data.allow_growth=True")
  return [what]


def unlike(trained: Identity, now: Identity) -> str | None:
  """How files differ from those of the same source that a model was trained on, in a line; None if they do not."""
  files_alone = (dataclasses.replace(identity, tokenizer=None) for identity in (trained, now))
  found = [*_differences(*files_alone), *(f"{_some(more)} in {n}" for n, more in _added(trained, now).items() if more)]
  return "; ".join(found) or None


def _differences(then: Identity, now: Identity) -> Iterator[str]:
  """A line for each difference, except for files that were added."""
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


def _of(some: Collection, every: Collection, one: str, more: str) -> str:
  """Such as "1 of 6 files is" or "2 of 6 files are"."""
  return f"{len(some)} of {len(every)} files {one if len(some) == 1 else more}"


def _some(names: list[str]) -> str:
  return f"{len(names)} new file{'s' * (len(names) > 1)} ({listed(names, _SHOWN)})"


def _short(fingerprint: str | None) -> str:
  """The first digits of a fingerprint, and its separator."""
  return "none" if fingerprint is None else re.sub(r"^([0-9a-f]{12})[0-9a-f]*", r"\1", fingerprint)
