"""Documents in files, block by block: what is read together, such as a Parquet file's row group.

A block's documents can be read by their number in it. Blocks are as large as is good to keep in memory (megabytes, but
for compressed JSON lines, which are whole files).
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import textwrap
from collections.abc import Iterable, Sequence

import numpy as np

from mc_jax.data import files, manifests, sources
from mc_jax.data.config import SourceConfig
from mc_jax.errors import ConfigError

Document = str | np.ndarray  # text, or ids int32 [length]

SUFFIXES = {
  "text": (),
  "jsonl": (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"),
  "parquet": (".parquet",),
  "arrayrecord": (".array_record", ".arrayrecord"),
}

# Arrow's types of columns that hold text; binary ones as UTF-8, "null" in a file without a single text.
_STRINGS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
_KINDS = {  # what JSON calls Python's types
  type(None): "null",
  bool: "a boolean",
  int: "a number",
  float: "a number",
  str: "a string",
  list: "a list",
  dict: "an object",
}

_JSONL_BLOCK = 4 << 20  # bytes


class Malformed(ConfigError):
  """A document that cannot be read, in a file that can."""


@dataclasses.dataclass(frozen=True)
class Block(abc.ABC):
  """Documents `first`, ..., `first + count - 1` of a file.

  Attributes:
    name: of the file, relative to the corpus.
    url: of the file.
    first: number of the first document within the file, from 0.
    count: of documents.
    size: bytes, about; of the compressed file where it is.
  """

  name: str
  url: str
  first: int
  count: int
  size: int

  @abc.abstractmethod
  def read(self) -> Sequence:
    """What the documents are made from, by their number in the block.

    Raises:
      ConfigError: naming the file that cannot be read.
    """

  @abc.abstractmethod
  def place(self, i: int) -> str:
    """Where document `i` of the block is, for errors: file and line, row or record."""

  @abc.abstractmethod
  def document(self, content: Sequence, i: int) -> Document:
    """Document `i` of the block, from what `read` returned: text that is UTF-8 without NULs, or ids.

    Raises:
      Malformed: naming file and place.
    """


@dataclasses.dataclass(frozen=True)
class TextFile(Block):
  """A file that is one document."""

  def read(self) -> Sequence[bytes]:
    with files.reading(self.url) as file:
      return [sources.plain(file.read())]

  def place(self, i: int) -> str:
    return self.url

  def document(self, content: Sequence[bytes], i: int) -> str:
    if not sources.is_text(content[i]):
      raise Malformed(sources.not_text(self.url, content[i]))
    return content[i].decode("utf-8")


@dataclasses.dataclass(frozen=True)
class JsonLines(Block):
  """Lines of a file, each a JSON object; empty lines are empty documents."""

  field: str
  offset: int  # of the first line, bytes; 0 in a compressed file
  end: int | None  # behind the last line; None: the file's end
  digest: str = ""  # of the whole file, decompressed: see data.identity

  def read(self) -> Sequence[bytes]:
    with files.reading(self.url, self.offset) as file:
      data = file.read() if self.end is None else file.read(self.end - self.offset)
    return _whole(self, data.split(b"\n"))

  def place(self, i: int) -> str:
    return f"{self.url}, line {self.first + i + 1}"

  def document(self, content: Sequence[bytes], i: int) -> str:
    line, where = sources.plain(content[i]).strip(), self.place(i)
    if not line:
      return ""
    if not sources.is_text(line):
      raise Malformed(sources.not_text(where, line))
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as error:
      why = str(error).replace("line 1 column", "column")
      raise Malformed(f"{where}: not JSON (each line must be a whole object): {why}") from error
    if isinstance(record, list):
      raise Malformed(f"{where}: a JSON array; of a file that is one array, jq -c '.[]' makes lines")
    if not isinstance(record, dict) or self.field not in record:
      has = _listed(record) if isinstance(record, dict) else _KINDS[type(record)]
      raise Malformed(f"{where}: no field {self.field!r} (field of the source); the line has {has}")
    return _text_of(record[self.field], self.field, where)


@dataclasses.dataclass(frozen=True)
class RowGroup(Block):
  """A row group of a Parquet file."""

  field: str
  group: int

  def read(self) -> Sequence:
    with _parquet(self.url) as table:
      return _whole(self, table.read_row_group(self.group, columns=[self.field])[self.field])

  def place(self, i: int) -> str:
    return f"{self.url}, row {self.first + i}"

  def document(self, content: Sequence, i: int) -> str:
    try:
      text = content[i].as_py()
      text = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
      raise Malformed(f"{self.place(i)}: not UTF-8: {error}") from error
    return _text_of(text, self.field, self.place(i))


class _Records:
  """The records of an ArrayRecord file, by number; opened when first read, and again in another process."""

  def __init__(self, url: str):
    self._url, self._reader = url, None

  def __getitem__(self, i: int) -> bytes:
    if self._reader is None:
      self._reader = _array_record(self._url)
    try:
      return self._reader.read([i])[0]
    except (RuntimeError, IndexError) as error:
      raise ConfigError(f"data.paths: cannot read {self._url}, record {i}: {error}") from error

  def __reduce__(self):
    return _Records, (self._url,)


@dataclasses.dataclass(frozen=True)
class TextRecords(Block):
  """An ArrayRecord file whose records are texts."""

  def read(self) -> Sequence[bytes]:
    return _Records(self.url)

  def place(self, i: int) -> str:
    return f"{self.url}, record {i}"

  def document(self, content: Sequence[bytes], i: int) -> str:
    record = content[i]
    if not sources.is_text(record):
      raise Malformed(sources.not_text(self.place(i), record))
    return record.decode("utf-8")


@dataclasses.dataclass(frozen=True)
class TokenRecords(Block):
  """An ArrayRecord file whose records are ids, made by data.prepare."""

  dtype: str
  vocab_size: int
  lengths: str  # URL of the documents' bytes of text; "" where they are not known

  def read(self) -> Sequence[bytes]:
    return _Records(self.url)

  def place(self, i: int) -> str:
    return f"{self.url}, record {i}"

  def document(self, content: Sequence[bytes], i: int) -> np.ndarray:
    record = content[i]
    if len(record) % np.dtype(self.dtype).itemsize:
      raise Malformed(f"{self.place(i)}: {len(record)} bytes are not ids of type {self.dtype}")
    ids = np.frombuffer(record, self.dtype).astype(np.int32)
    if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
      raise Malformed(f"{self.place(i)}: id {ids.max()} is not below the tokenizer's {self.vocab_size}")
    return ids

  def text_bytes(self, i: int) -> int | None:
    """UTF-8 bytes of the text that document `i` was made from, if known."""
    if not self.lengths:
      return None
    with files.reading(files.local(self.lengths), i * manifests.LENGTHS.itemsize) as file:
      return int(np.frombuffer(file.read(manifests.LENGTHS.itemsize), manifests.LENGTHS)[0])


def _text_of(value: object, field: str, where: str) -> str:
  """A field's text; Malformed if it is none that a tokenizer can take."""
  if not isinstance(value, str):
    raise Malformed(f"{where}: field {field!r} is {_KINDS.get(type(value), type(value).__name__)}, not a string")
  if "\0" in value:
    raise Malformed(f"{where}: field {field!r} holds a NUL character, which no text does")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    half = f"\\u{ord(value[error.start]):04x}"
    raise Malformed(f"{where}: field {field!r} holds {half}, half a character, at {error.start:,}") from error
  return value


def _listed(names: Iterable[str]) -> str:
  return textwrap.shorten(", ".join(names), 200).encode("utf-8", "backslashreplace").decode()


def _whole(block: Block, content: Sequence) -> Sequence:
  if len(content) < block.count:
    raise ConfigError(
      f"{block.url} was changed since the start: it had {block.count} documents from number {block.first} on, and now "
      f"has {len(content)}"
    )
  return content


def blocks(source: SourceConfig, fingerprint: str | None = None) -> list[Block]:
  """The blocks of a source's files, in the order of their names; blocks without documents are left out.

  Args:
    source: any but a task.
    fingerprint: of the tokenizer that source "tokens" must be made with; None: of any.

  Raises:
    ConfigError: naming what is missing, cannot be read, or is of another tokenizer; or there is not one document.
  """
  if source.source == "stdlib":
    root, texts = sources.stdlib_root(), sources.stdlib()
    return [TextFile(name, str(root / name), 0, 1, len(texts[name])) for name in sorted(texts)]
  if source.source == "tokens":
    found = _prepared(source, fingerprint)
  else:
    find = {"text": _text, "jsonl": _jsonl, "parquet": _row_groups, "arrayrecord": _text_records}[source.source]
    urls = files.find(source.paths, SUFFIXES[source.source])
    found = [block for name, url in urls.items() for block in find(name, url, source.field)]
  found = [block for block in found if block.count]
  if not found:
    raise ConfigError(f"data.paths: the files of {source.paths!r} hold no documents")
  return found


def _text(name: str, url: str, field: str) -> list[Block]:
  return [TextFile(name, url, 0, 1, files.size(url))]


def _jsonl(name: str, url: str, field: str) -> list[Block]:
  """Blocks of about _JSONL_BLOCK bytes; of a compressed file, which must be read from its start, one."""
  compressed = url.endswith((".gz", ".zst"))
  found, line, offset, count, position = [], 0, 0, 0, 0
  open_line = False  # whether the last line has no end yet
  digest = hashlib.blake2b(digest_size=8)
  with files.reading(url) as file:
    while data := file.read(_JSONL_BLOCK):
      digest.update(data)
      last = data.rfind(b"\n") + 1
      if last and not compressed:
        count += data.count(b"\n")
        found.append(JsonLines(name, url, line, count, position + last - offset, field, offset, position + last))
        line, offset, count = line + count, position + last, 0
      else:
        count += data.count(b"\n")
      position += len(data)
      open_line = last < len(data)
  if count or open_line:
    size = files.size(url) if compressed else position - offset
    found.append(JsonLines(name, url, line, count + open_line, size, field, offset, None))
  return [dataclasses.replace(block, digest=digest.hexdigest()) for block in found]


def _row_groups(name: str, url: str, field: str) -> list[Block]:
  with _parquet(url) as table:
    names = table.schema_arrow.names
    if field not in names:
      raise ConfigError(f"{url} has no column {field!r} (field of the source); it has {_listed(names)}")
    if names.count(field) > 1:
      raise ConfigError(f"{url} has {names.count(field)} columns {field!r} (field of the source): rename all but one")
    kind = table.schema_arrow.field(field).type
    values = kind.value_type if str(kind).startswith("dictionary") else getattr(kind, "storage_type", kind)
    if str(values) not in _STRINGS:
      raise ConfigError(f"{url}: column {field!r} (field of the source) holds {kind}, not strings")
    column = next(i for i in range(table.metadata.num_columns) if table.schema.column(i).path == field)
    found, first = [], 0
    for group in range(table.num_row_groups):
      metadata = table.metadata.row_group(group)
      size = metadata.column(column).total_compressed_size
      found.append(RowGroup(name, url, first, metadata.num_rows, size, field, group))
      first += metadata.num_rows
  return found


def _text_records(name: str, url: str, field: str) -> list[Block]:
  reader = _array_record(url)
  return [TextRecords(name, url, 0, reader.num_records(), files.size(url))]


def _prepared(source: SourceConfig, fingerprint: str | None) -> list[Block]:
  found = []
  for folder in files.matches(source.paths):
    manifest = manifests.read(folder)
    if fingerprint is not None and manifest.tokenizer != fingerprint:
      raise ConfigError(
        f"{folder} was tokenized with another tokenizer (its manifest has {manifest.tokenizer}, data.tokenizer is "
        f"{fingerprint}): set data.tokenizer to the one in that folder, and data.separator as it was then"
      )
    for shard in manifest.shards:
      if not shard.documents:  # all of its part were skipped or empty; no reader opens a file without records
        continue
      url = manifests.join(folder, shard.file)
      records = _array_record(url).num_records()
      if records != shard.documents:
        raise ConfigError(f"{url} has {records} records, its manifest says {shard.documents}: it is torn or replaced")
      lengths = manifests.join(folder, shard.lengths) if shard.lengths else ""
      if lengths and files.size(lengths) != records * manifests.LENGTHS.itemsize:
        raise ConfigError(f"{lengths} is not of the {records} records of {url}: it is torn or replaced")
      kind = (manifest.dtype, manifest.vocab_size)
      found.append(TokenRecords(shard.file, url, 0, records, shard.bytes, *kind, lengths))
  return found


def _array_record(url: str):
  """A reader of random records. A file that is none would read as empty."""
  from array_record.python import array_record_module

  path = files.local(url)
  if not pathlib.Path(path).is_file():
    raise ConfigError(f"data.paths: cannot read {url}: no such file")
  try:
    reader = array_record_module.ArrayRecordReader(
      path, options="readahead_buffer_size:0", file_reader_buffer_size=32_768
    )
    ok = reader.ok() and (reader.num_records() > 0 or pathlib.Path(path).stat().st_size == 0)
  except (RuntimeError, ValueError, IndexError) as error:
    raise ConfigError(f"data.paths: cannot read {url}: not an ArrayRecord file: {error}") from error
  if not ok:
    raise ConfigError(f"data.paths: cannot read {url}: not an ArrayRecord file, or one without records")
  return reader


@contextlib.contextmanager
def _parquet(url: str):
  """Opens a Parquet file; whatever goes wrong in it becomes an error that names it."""
  pyarrow = files.pyarrow_module(url)
  try:
    with files.reading(url) as file:
      yield pyarrow.parquet.ParquetFile(file)
  except pyarrow.ArrowException as error:
    raise ConfigError(f"data.paths: cannot read {url}: {error}") from error
