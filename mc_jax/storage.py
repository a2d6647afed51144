"""Files on this machine and in buckets: their names, writes that happen whole or not at all, and digests."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import uuid

from etils import epath

DIGESTS = "SHA256SUMS"  # name of the file that holds a folder's digests


def path(text: str) -> epath.Path:
  """The path of a user's text: ~ and ~NAME are home folders, URLs such as gs:// stay as they are."""
  return epath.Path(text) if in_bucket(text) else epath.Path(os.path.expanduser(text))


def in_bucket(path: epath.PathLike) -> bool:
  """Whether a path is a URL, not on this machine."""
  return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
  """The absolute path, which Orbax requires."""
  path = epath.Path(path)
  return path if in_bucket(path) else path.absolute()


def write(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file, text as UTF-8, atomically: readers see the old content or the new, also after a kill.

  If two processes write the same file at once, the later one's content remains.

  Args:
    path: The file, on this machine or in a bucket; its folder exists.
    content: The content. Characters that UTF-8 lacks (halves of surrogate pairs, which stand for the bytes of
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


def write_digests(folder: epath.Path) -> None:
  """Writes the digests of all files below `folder` into it, atomically, to detect damage that file systems do not
  report.

  They are in the format of sha256sum: `cd FOLDER && sha256sum -c SHA256SUMS` checks them by hand.
  """
  text = "".join(f"{digest}  {name}\n" for name, digest in _digests(folder, _names(folder)).items())
  write(folder / DIGESTS, text)


def has_digests(folder: epath.Path) -> bool:
  """Whether the folder is complete: its digests are the last file that is written."""
  return (folder / DIGESTS).exists()


def damage(folder: epath.Path, part: int = 0, parts: int = 1) -> list[str]:
  """The files that have changed since `write_digests`, one line each; [] for an intact folder.

  Files are compared with their digests by name: no path is taken from the content of the folder.

  Args:
    folder: A folder with digests.
    part: The share of the files whose content is read, from 0, where several processes divide the work.
    parts: The number of shares.
  """
  try:
    lines = [line.split("  ", 1) for line in (folder / DIGESTS).read_text(encoding="utf-8").splitlines()]
    written = {name: digest for digest, name in lines}
  except (OSError, ValueError) as error:  # ValueError: lines that are no digests, or no text
    return [f"{folder / DIGESTS} cannot be read: {error}"]
  names = _names(folder)
  problems = [f"{folder / name} is missing" for name in sorted(written.keys() - set(names))]
  problems += [f"{folder / name} is not among the files of {DIGESTS}" for name in names if name not in written]
  for name, digest in _digests(folder, [name for name in names if name in written][part::parts]).items():
    if digest != written[name]:
      problems.append(f"{folder / name} is not what was written: {digest}")
  return problems


def _names(folder: epath.Path) -> list[str]:
  """The names of all files below `folder`, relative to it and sorted, except the digests themselves."""
  names, folders = [], [folder]
  while folders:
    for path in folders.pop().iterdir():
      if path.is_dir():
        folders.append(path)
      elif path.parent != folder or DIGESTS not in path.name:
        names.append(str(path.relative_to(folder)))
  return sorted(names)


def _digests(folder: epath.Path, names: list[str]) -> dict[str, str]:
  """{name: SHA-256}; for a file that cannot be read, the error in its place."""

  def digest(name: str) -> str:
    try:
      with (folder / name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
    return dict(zip(names, pool.map(digest, names), strict=True))
