"""Processes that prepare data: two at once in one folder, and workers whose parent is gone."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from marks import slow

from mc_jax.data import lock

ROOT = pathlib.Path(__file__).parent.parent.parent

PARENT = """
import multiprocessing, os, sys, time
from mc_jax.data import workers

def work():
  workers.follow_parent()
  print(os.getpid(), flush=True)
  time.sleep(60)

if __name__ == "__main__":
  multiprocessing.get_context("spawn").Process(target=work).start()
  time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, slow(signal.SIGTERM), slow(signal.SIGHUP)])
def test_a_worker_ends_with_its_parent(tmp_path, number):
  (tmp_path / "parent.py").write_text(PARENT)
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  command = [sys.executable, tmp_path / "parent.py"]
  with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
    worker = int(parent.stdout.readline())
    parent.send_signal(number)
    assert parent.wait() == -number
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{worker}"):
      assert time.monotonic() < deadline
      time.sleep(0.05)


def test_a_second_prepare_leaves_the_first_one_s_folder_alone(tmp_path):
  (tmp_path / "text.txt").write_text("a memory of a memory")
  out = tmp_path / "out"
  flags = ["--source=text", f"--paths={tmp_path / 'text.txt'}", f"--out={out}", "--tokenizer=bytes"]
  with lock.take(out, "", ""):
    (out / ".partial-first").mkdir()
    command = [sys.executable, "-m", "mc_jax.data.prepare", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: another process prepares {out}: pid {os.getpid()} on ")
    assert sorted(os.listdir(out)) == [".partial-first", lock.FILE]
