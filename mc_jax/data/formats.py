"""Documents in files, by block. A block is the unit of reading, such as a row group of a Parquet file.

The documents of a block can be read by their number in it. Blocks are small enough to keep several in memory: a few
megabytes, except for compressed JSON lines, where a block is the whole file.
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

# Arrow's types of columns that can hold text: binary ones as UTF-8, and "null" in a file without any text.
_STRINGS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
_KINDS = {  # JSON's names of Python's types
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
    name: The file's name, relative to the corpus.
    url: The file's URL.
    first: The number of the first document within the file, from 0.
    count: The number of documents.
    size: The approximate size in bytes, compressed if the file is.
  """

  name: str
  url: str
  first: int
  count: int
  size: int

  @abc.abstractmethod
  def read(self) -> Sequence:
    """The raw content of each document, by its number in the block.

    Raises:
      ConfigError: The file cannot be read; the error names it.
    """

  @abc.abstractmethod
  def place(self, i: int) -> str:
    """The place of document `i` of the block, for errors: file and line, row or record."""

  @abc.abstractmethod
  def document(self, content: Sequence, i: int) -> Document:
    """Document `i` of the block: text that is valid UTF-8 without NULs, or ids.

    Args:
      content: The result of `read`.
      i: The document's number in the block.

    Raises:
      Malformed: The document is neither; the error names its place.
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
  """Lines of a file, each a JSON object; an empty line is an empty document."""

  field: str
  offset: int  # byte offset of the first line; 0 in a compressed file
  end: int | None  # byte offset of the end of the last line; None: the end of the file
  digest: str = ""  # digest of the whole file, decompressed; see data.identity

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
      raise Malformed(f"{where}: a JSON array; jq -c '.[]' turns a file that is one array into lines")
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
  """The records of an ArrayRecord file, by number. Every process opens the file at its first read."""

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
  """An ArrayRecord file of data.prepare, whose records are ids."""

  dtype: str
  vocab_size: int
  lengths: str  # URL of the file with each document's bytes of text; "" if there is none

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
    """The number of UTF-8 bytes of document `i` before it was tokenized; None if unknown."""
    if not self.lengths:
      return None
    with files.reading(files.local(self.lengths), i * manifests.LENGTHS.itemsize) as file:
      return int(np.frombuffer(file.read(manifests.LENGTHS.itemsize), manifests.LENGTHS)[0])


def _text_of(value: object, field: str, where: str) -> str:
  """The text of a field. Raises Malformed if it is not a string that a tokenizer can take."""
  if not isinstance(value, str):
    raise Malformed(f"{where}: field {field!r} is {_KINDS.get(type(value), type(value).__name__)}, not a string")
  if "\0" in value:
    raise Malformed(f"{where}: field {field!r} holds a NUL character, so it is not text")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    surrogate = f"\\u{ord(value[error.start]):04x}"
    raise Malformed(
      f"{where}: field {field!r} holds {surrogate}, half a character, at position {error.start:,}"
    ) from error
  return value


def _listed(names: Iterable[str]) -> str:
  return textwrap.shorten(", ".join(names), 200).encode("utf-8", "backslashreplace").decode()


def _whole(block: Block, content: Sequence) -> Sequence:
  if len(content) < block.count:
    raise ConfigError(
      f"{block.url} has changed since the run started: it had {block.count} documents from number {block.first} on, "
      f"and now has {len(content)}"
    )
  return content


def blocks(source: SourceConfig, fingerprint: str | None = None) -> list[Block]:
  """The blocks of a source's files, in the order of the files' names, without empty blocks.

  Args:
    source: A source of documents, not a task.
    fingerprint: The fingerprint of the tokenizer that a source "tokens" must have been tokenized with; None: any.

  Raises:
    ConfigError: A file is missing, cannot be read or was tokenized with another tokenizer, and the error names it; or
      there are no documents at all.
  """
  if source.source == "stdlib":
    root, texts = sources.stdlib_root(), sources.stdlib()
    return [TextFile(name, str(root / name), 0, 1, len(texts[name])) for name in sorted(texts)]
  if source.source == "tokens":
    every = _prepared(source, fingerprint)
  else:
    split = {"text": _text, "jsonl": _jsonl, "parquet": _row_groups, "arrayrecord": _text_records}[source.source]
    urls = files.find(source.paths, SUFFIXES[source.source])
    every = [block for name, url in urls.items() for block in split(name, url, source.field)]
  filled = [block for block in every if block.count]
  if not filled:
    raise ConfigError(f"data.paths: the files of {source.paths!r} hold no documents")
  return filled


def _text(name: str, url: str, field: str) -> list[Block]:
  return [TextFile(name, url, 0, 1, files.size(url))]


def _jsonl(name: str, url: str, field: str) -> list[Block]:
  """Blocks of about _JSONL_BLOCK bytes; a single block for a compressed file, which must be read from its start."""
  compressed = url.endswith((".gz", ".zst"))
  blocks, line, offset, count, position = [], 0, 0, 0, 0
  open_line = False  # whether the data so far end within a line
  digest = hashlib.blake2b(digest_size=8)
  with files.reading(url) as file:
    while data := file.read(_JSONL_BLOCK):
      digest.update(data)
      last = data.rfind(b"\n") + 1
      if last and not compressed:
        count += data.count(b"\n")
        blocks.append(JsonLines(name, url, line, count, position + last - offset, field, offset, position + last))
        line, offset, count = line + count, position + last, 0
      else:
        count += data.count(b"\n")
      position += len(data)
      open_line = last < len(data)
  if count or open_line:
    size = files.size(url) if compressed else position - offset
    blocks.append(JsonLines(name, url, line, count + open_line, size, field, offset, None))
  return [dataclasses.replace(block, digest=digest.hexdigest()) for block in blocks]


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
    blocks, first = [], 0
    for group in range(table.num_row_groups):
      metadata = table.metadata.row_group(group)
      size = metadata.column(column).total_compressed_size
      blocks.append(RowGroup(name, url, first, metadata.num_rows, size, field, group))
      first += metadata.num_rows
  return blocks


def _text_records(name: str, url: str, field: str) -> list[Block]:
  reader = _array_record(url)
  return [TextRecords(name, url, 0, reader.num_records(), files.size(url))]


def _prepared(source: SourceConfig, fingerprint: str | None) -> list[Block]:
  blocks = []
  for folder in files.matches(source.paths):
    manifest = manifests.read(folder)
    if fingerprint is not None and manifest.tokenizer != fingerprint:
      raise ConfigError(
        f"{folder} was tokenized with another tokenizer (its manifest has {manifest.tokenizer}, data.tokenizer is "
        f"{fingerprint}): set data.tokenizer to the one in that folder, and data.separator to the one used then"
      )
    for shard in manifest.shards:
      if not shard.documents:  # all were skipped or empty; no reader opens a file without records
        continue
      url = manifests.join(folder, shard.file)
      records = _array_record(url).num_records()
      if records != shard.documents:
        raise ConfigError(
          f"{url} has {records} records, its manifest says {shard.documents}: it is incomplete or was replaced"
        )
      lengths = manifests.join(folder, shard.lengths) if shard.lengths else ""
      if lengths and files.size(lengths) != records * manifests.LENGTHS.itemsize:
        raise ConfigError(
          f"{lengths} does not belong to the {records} records of {url}: it is incomplete or was replaced"
        )
      kind = (manifest.dtype, manifest.vocab_size)
      blocks.append(TokenRecords(shard.file, url, 0, records, shard.bytes, *kind, lengths))
  return blocks


def _array_record(url: str):
  """A reader of single records. Raises ConfigError for other files, which the package would read as empty."""
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
  """Opens a Parquet file; an error while it is read becomes a ConfigError that names it."""
  pyarrow = files.pyarrow_module(url)
  try:
    with files.reading(url) as file:
      yield pyarrow.parquet.ParquetFile(file)
  except pyarrow.ArrowException as error:
    raise ConfigError(f"data.paths: cannot read {url}: {error}") from error
