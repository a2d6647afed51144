"""Digests of a folder's files, by which damage is found that a file system does not report.

They lie in the folder, in the format of sha256sum: `cd FOLDER && sha256sum -c SHA256SUMS` checks them by hand.
"""

from __future__ import annotations

import concurrent.futures
import hashlib

from etils import epath

from mc_jax.data import whole

FILE = "SHA256SUMS"


def write(folder: epath.Path) -> None:
  """Writes the digests of all files below `folder`, all or nothing; from now on it counts as complete."""
  text = "".join(f"{digest}  {name}\n" for name, digest in _digests(folder, _names(folder)).items())
  whole.write(folder / FILE, text)


def complete(folder: epath.Path) -> bool:
  """Whether the folder's digests were written, which is the last thing that happens to it."""
  return (folder / FILE).exists()


def problems(folder: epath.Path, part: int = 0, parts: int = 1) -> list[str]:
  """What is not as it was written, one line for each file; [] of an intact folder.

  Files are compared with their digests by name: no path is taken from what is written in the folder.

  Args:
    folder: that `write` completed.
    part, parts: of the files' contents, only those of one part are read, where several processes share the work.
  """
  try:
    lines = [line.split("  ", 1) for line in (folder / FILE).read_text(encoding="utf-8").splitlines()]
    written = {name: digest for digest, name in lines}
  except (OSError, ValueError) as error:  # ValueError: lines that are no digests, or no text
    return [f"{folder / FILE} cannot be read: {error}"]
  names = _names(folder)
  found = [f"{folder / name} is missing" for name in sorted(written.keys() - set(names))]
  found += [f"{folder / name} is not among the files of {FILE}" for name in names if name not in written]
  for name, digest in _digests(folder, [name for name in names if name in written][part::parts]).items():
    if digest != written[name]:
      found.append(f"{folder / name} is not what was written: {digest}")
  return found


def _names(folder: epath.Path) -> list[str]:
  """All files below `folder`, but the digests' own; their names from there, sorted."""
  found, folders = [], [folder]
  while folders:
    for path in folders.pop().iterdir():
      if path.is_dir():
        folders.append(path)
      elif path.parent != folder or FILE not in path.name:
        found.append(str(path.relative_to(folder)))
  return sorted(found)


def _digests(folder: epath.Path, names: list[str]) -> dict[str, str]:
  """{name: SHA-256}; of a file that cannot be read, the error in its place."""

  def digest(name: str) -> str:
    try:
      with (folder / name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
    return dict(zip(names, pool.map(digest, names), strict=True))
