"""Real files with given documents."""

import json

import pyarrow
import pyarrow.parquet
from array_record.python import array_record_module


def array_record(path, records):
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def parquet(path, texts, rows=7, field="text"):
  pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), field: texts}), path, row_group_size=rows)


def zstd(data):
  return pyarrow.compress(data, codec="zstd", asbytes=True)


def lines(texts, field="text"):
  return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()
