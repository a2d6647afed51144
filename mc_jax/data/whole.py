"""Writes files that are in place whole or not at all."""

from __future__ import annotations

import uuid

from etils import epath


def write(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file, text as UTF-8: whoever reads it, and a kill at any moment, finds the old content or the new.

  Of two processes that write the same file at once, the later one's content remains.

  Args:
    path: The file, on this machine or in a bucket; its folder exists.
    content: What it is to hold. Characters that UTF-8 lacks (halves of surrogate pairs, which stand for the bytes of
      undecodable file names) are written as escapes.
  """
  path = epath.Path(path)
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
  try:
    temporary.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
