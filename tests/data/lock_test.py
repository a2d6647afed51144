"""A lock names its holder, and is gone when its holder is, however that ended; with and without flock."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import platform
import signal
import threading
import time

import pytest

from mc_jax.data import lock


def _take(folder):
  return lock.take(folder, "trains in", "use another --workdir")


@pytest.fixture(params=["flock", "heartbeat"])
def kind(request, monkeypatch):
  """How the file system locks."""
  monkeypatch.setattr(lock, "_BEAT", 0.1)
  monkeypatch.setattr(lock, "_SILENCE", 1.0)
  if request.param == "heartbeat":

    def unsupported(*_):
      raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
  return request.param


@contextlib.contextmanager
def _process(work):
  """A forked process that does `work`, and its id once that has returned; it lives until it is killed."""
  ready, told = os.pipe()
  child = os.fork()
  if not child:
    try:
      work()
      os.write(told, b".")
      time.sleep(60)
    finally:
      os._exit(0)
  try:
    os.read(ready, 1)
    yield child
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
      os.waitpid(child, 0)
    os.close(ready)
    os.close(told)


def test_who_comes_second_is_told_of_the_first_and_changes_nothing(kind, tmp_path):
  folder = tmp_path / "run"
  with _process(lambda: _take(folder)) as first:
    before = [path.name for path in folder.iterdir()]
    for _ in range(2):
      with pytest.raises(lock.Taken) as raised:
        _take(folder)
      assert str(raised.value).startswith(
        f"another process trains in {folder}: pid {first} on {platform.node()} since 20"
      )
      assert str(raised.value).endswith("; wait for it, stop it, or use another --workdir")
    assert [path.name for path in folder.iterdir()] == before == [lock.FILE]
    assert json.loads((folder / lock.FILE).read_text())["pid"] == first


def test_a_lock_is_gone_with_its_holder(kind, tmp_path):
  with _take(tmp_path), pytest.raises(lock.Taken):
    _take(tmp_path)
  assert list(tmp_path.iterdir()) == []
  with _process(lambda: _take(tmp_path)) as first:
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    begin = time.monotonic()
    with _take(tmp_path):
      assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
    assert (time.monotonic() - begin < 0.5) == (kind == "flock")
  assert list(tmp_path.iterdir()) == []


def test_a_forked_child_neither_keeps_a_lock_nor_gives_it_back(kind, tmp_path):
  held = _take(tmp_path)
  with _process(held.release):
    with pytest.raises(lock.Taken):
      _take(tmp_path)
    held.release()
    _take(tmp_path).release()


def test_of_many_that_take_it_at_once_one_has_it(tmp_path):
  """Also where one removes the file that another has just opened."""
  inside, most, taken = [], [], []

  def contend():
    for _ in range(200):
      with contextlib.suppress(lock.Taken), _take(tmp_path):
        inside.append(0)
        most.append(len(inside))
        time.sleep(0)
        taken.append(inside.pop())

  threads = [threading.Thread(target=contend) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(taken) > 20
  assert max(most) == 1


def test_an_empty_lock_is_somebody_s_all_the_same(tmp_path):
  descriptor = os.open(tmp_path / lock.FILE, os.O_CREAT | os.O_RDWR)
  fcntl.flock(descriptor, fcntl.LOCK_EX)
  with pytest.raises(lock.Taken, match="its lock names no process yet"):
    _take(tmp_path)
  os.close(descriptor)
  _take(tmp_path).release()


@pytest.mark.parametrize("kind", ["heartbeat"], indirect=True)
def test_a_holder_that_slept_too_long_ends_when_it_wakes_up(kind, tmp_path):
  with _process(lambda: _take(tmp_path)) as first:
    os.kill(first, signal.SIGSTOP)
    with _take(tmp_path):
      os.kill(first, signal.SIGCONT)
      assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 1
      assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("kind", ["heartbeat"], indirect=True)
def test_of_two_that_wait_for_a_dead_holder_one_takes_its_place(kind, tmp_path):
  (tmp_path / lock.FILE).write_text('{"host": "gone", "pid": 1, "since": "2026-01-01"}')
  found = []

  def wait():
    try:
      found.append(_take(tmp_path))
    except lock.Taken as error:
      assert f"pid {os.getpid()}" in str(error)

  threads = [threading.Thread(target=wait) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  (held,) = found
  held.release()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match="file"):
    _take(pathlib.Path(tmp_path / "file" / "run"))
