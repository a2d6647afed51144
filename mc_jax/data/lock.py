"""Locks a folder for one process at a time. A lock names its holder and does not outlive it.

On most file systems the lock is a flock, which the kernel releases however its holder ends. Buckets and some network
file systems have none; there it is a file that only one process can create and that the holder rewrites every few
seconds. A process that finds the file watches it: if it does not change for a minute, the holder counts as dead.
Buckets allow no stronger guarantee, so a holder that was suspended for longer and finds its lock taken over exits.
"""

from __future__ import annotations

import abc
import contextlib
import datetime
import errno
import fcntl
import itertools
import json
import os
import platform
import sys
import threading
import time
import uuid

import fsspec.core
from etils import epath

from mc_jax import storage

FILE = "lock"

_BEAT = 15.0  # seconds between two rewrites by the holder
_SILENCE = 60.0  # seconds without a rewrite after which a holder counts as dead
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Taken(OSError):
  """Another process holds the lock; the message names it."""


class Lock(abc.ABC):
  """A lock that this process holds until it calls `release` or ends."""

  @abc.abstractmethod
  def release(self) -> None:
    """Releases the lock; has no effect in a forked child."""

  @property
  def descriptors(self) -> tuple[int, ...]:
    """File descriptors that keep the lock while a child process holds them, even after this process has ended."""
    return ()

  def __enter__(self) -> Lock:
    return self

  def __exit__(self, *_) -> None:
    self.release()


def take(folder: epath.PathLike, doing: str, instead: str, file: str = FILE) -> Lock:
  """Takes the lock of a folder, creating the folder if it is missing.

  Args:
    folder: The folder, on this machine or in a bucket.
    doing: What a holder does, for the message, such as "trains in".
    instead: An alternative to waiting, for the message, such as "use another --workdir".
    file: The lock's name in the folder.

  Raises:
    Taken: Another process holds the lock; nothing was changed.
    OSError: The lock cannot be written.
  """
  folder = epath.Path(folder)
  new = not folder.exists()
  folder.mkdir(parents=True, exist_ok=True)
  path = str(folder / file)
  try:
    if not storage.in_bucket(path):
      with contextlib.suppress(_Unsupported):
        return _Flock(path, new)
    return _Heartbeat(path)
  except _Held as error:
    raise Taken(f"another process {doing} {folder}: {error}; wait for it, stop it, or {instead}") from None


class _Held(Exception):
  """Another process holds the lock; the text describes it."""

  def __init__(self, content: bytes):
    try:
      super().__init__("pid {pid} on {host} since {since}".format(**json.loads(content)))
    except (ValueError, KeyError, TypeError):  # the lock has just been taken, or another program wrote the file
      super().__init__("its lock names no process yet")


class _Unsupported(Exception):
  """The file system has no flock."""


class _Flock(Lock):
  """A flock on a file."""

  def __init__(self, path: str, new: bool):
    self._path, self._new = path, new  # new: whether the folder was created for the lock
    while True:
      self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
      try:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as error:
        holder = os.pread(self._descriptor, 4096, 0)
        os.close(self._descriptor)
        if isinstance(error, BlockingIOError):
          raise _Held(holder) from None
        if error.errno in _NO_FLOCK:
          raise _Unsupported from error
        raise
      if self._in_place():
        break
      os.close(self._descriptor)  # the previous holder has just removed this file
    _open.add(self._descriptor)
    with contextlib.suppress(OSError):  # the lock holds even if the disk is full
      os.ftruncate(self._descriptor, 0)
      os.pwrite(self._descriptor, _content(_holder()), 0)

  @property
  def descriptors(self) -> tuple[int, ...]:
    return (self._descriptor,)

  def release(self) -> None:
    if self._descriptor not in _open:
      return
    _open.remove(self._descriptor)
    if self._in_place():
      with contextlib.suppress(OSError):
        os.unlink(self._path)
        if self._new:
          os.rmdir(os.path.dirname(self._path))  # fails if the holder left anything in it
    os.close(self._descriptor)

  def _in_place(self) -> bool:
    """Whether the path still refers to the locked file."""
    try:
      return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
    except FileNotFoundError:
      return False


_open: set[int] = set()  # a forked child closes its copies, which would keep the lock


def _close_in_child() -> None:
  while _open:
    os.close(_open.pop())


os.register_at_fork(after_in_child=_close_in_child)


class _Heartbeat(Lock):
  """A lock for file systems without flock and for buckets."""

  def __init__(self, url: str):
    self._files, self._path = fsspec.core.url_to_fs(url)
    self._local = not storage.in_bucket(url)
    self._holder = _holder() | {"token": uuid.uuid4().hex}
    if not self._create():
      self._take_over()
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
    self._thread.start()

  def release(self) -> None:
    if os.getpid() != self._holder["pid"]:
      return
    self._closed.set()
    self._thread.join()
    if self._is_mine(self._read()):
      self._files.rm_file(self._path)

  def _create(self) -> bool:
    try:
      if self._local:
        with open(self._path, "xb") as file:
          file.write(_content(self._holder))
      else:
        self._files.pipe_file(self._path, _content(self._holder), mode="create")
    except FileExistsError:
      return False
    return True

  def _write(self, **facts: object) -> None:
    if self._local:
      storage.write(self._path, _content(self._holder | facts))
    else:
      self._files.pipe_file(self._path, _content(self._holder | facts))

  def _take_over(self) -> None:
    """Takes the lock over once its holder counts as dead. Raises _Held if the holder is alive."""
    before, begin = self._read(), time.monotonic()
    print(f"{self._path}: {_Held(before)}; checking for {_SILENCE:.0f} s whether it is alive", flush=True)
    while time.monotonic() < begin + _SILENCE:
      time.sleep(_BEAT / 3)
      if (now := self._read()) != before and now:
        raise _Held(now)
      if not now and self._create():
        return
    self._write()
    time.sleep(_BEAT)  # if several processes do this at once, the last to write gets the lock
    if not self._is_mine(now := self._read()):
      raise _Held(now)

  def _beat(self) -> None:
    for beat in itertools.count(1):
      if self._closed.wait(_BEAT):
        return
      try:
        content = self._read()
        if content and not self._is_mine(content):
          print(f"error: {self._path} was taken over by {_Held(content)}", file=sys.__stderr__, flush=True)
          os._exit(1)
        self._write(beat=beat)
      except Exception as error:  # networks fail now and then; the next attempt may succeed
        print(f"{self._path} could not be renewed: {error}", file=sys.__stderr__, flush=True)

  def _read(self) -> bytes:
    """The lock's content; empty if the lock does not exist."""
    try:
      return self._files.cat_file(self._path)
    except FileNotFoundError:
      return b""

  def _is_mine(self, content: bytes) -> bool:
    return self._holder["token"].encode() in content


def _holder() -> dict[str, object]:
  """The facts about this process that a lock stores."""
  now = datetime.datetime.now().astimezone()
  return {"host": platform.node(), "pid": os.getpid(), "since": now.isoformat(" ", "seconds")}


def _content(facts: dict[str, object]) -> bytes:
  return (json.dumps(facts) + "\n").encode()
