"""Two processes of one job: they train as one does, end when one is killed, and go on together."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from mc_jax import storage
from mc_jax.data import lock
from mc_jax.training import metrics

ROOT = pathlib.Path(__file__).parent.parent

FLAGS = [
  "--config=configs/quickstart.py",
  "--config.data.source=text",
  "--config.data.validation_fraction=0.3",
  "--config.data.length=32",
  "--config.data.packing.method=best_fit",  # each process knows the places of its own shards alone
  "--config.data.packing.window=3",
  "--config.model.layers=1",
  "--config.model.d_model=32",
  "--config.model.mlp_dim=32",
  "--config.model.memory.rule=linear",
  "--config.model.memory.segment_length=8",
  "--config.model.memory.chunk=8",
  "--config.train.steps=60",
  "--config.train.log_every=1",
  "--config.train.eval_every=30",
  "--config.train.checkpoint_every=10",
  "--config.train.sample_length=2",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp("texts")
  for i in range(10):
    (folder / f"{i}.txt").write_text(f"memory {i} of a memory {i * i}\n" * 40)
  return folder


def _start(texts, workdir, *flags):
  command = [
    sys.executable,
    "-m",
    "mc_jax.train",
    *FLAGS,
    f"--config.data.paths={texts}",
    f"--workdir={workdir}",
    *flags,
  ]
  cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ | cache,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _start_two(texts, workdir, *flags):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  job = [f"--coordinator=localhost:{port}", "--num_processes=2", "--heartbeat_timeout_seconds=15", *flags]
  return [_start(texts, workdir, *job, f"--process_id={i}") for i in range(2)]


def _finish(*processes):
  """Exit statuses and what was printed."""
  try:
    printed = [process.communicate(timeout=300)[0] for process in processes]
  except subprocess.TimeoutExpired:
    for process in processes:
      process.kill()
    raise
  return [process.returncode for process in processes], printed


def _wait_for(path, *processes):
  deadline = time.monotonic() + 300
  while not path.exists():
    assert all(process.poll() is None for process in processes), _finish(*processes)
    assert time.monotonic() < deadline
    time.sleep(0.05)


def _wait_for_steps(workdir, count, *processes):
  deadline = time.monotonic() + 300
  while len(metrics.read(workdir)) < count:
    assert all(process.poll() is None for process in processes), _finish(*processes)
    assert time.monotonic() < deadline
    time.sleep(0.05)


def _losses(workdir):
  return {record["step"]: record["loss"] for record in metrics.read(workdir)}


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_when_one_was_killed(texts, tmp_path):
  alone = _start(texts, tmp_path / "alone")
  assert _finish(alone)[0] == [0]

  pair = _start_two(texts, tmp_path / "pair")
  _wait_for(tmp_path / "pair" / "checkpoints" / "10" / storage.DIGESTS, *pair)  # it is complete
  pair[1].send_signal(signal.SIGKILL)
  killed = time.monotonic()
  (first, _), (printed, _) = _finish(*pair)
  assert first not in (0, None), printed
  assert time.monotonic() - killed < 60
  before = _losses(tmp_path / "pair")
  assert 10 <= max(before) < 60

  pair = _start_two(texts, tmp_path / "pair")
  _wait_for(tmp_path / "pair" / "checkpoints" / "30", *pair)
  pair[1].send_signal(signal.SIGTERM)  # to one of them: both stop, with a checkpoint
  codes, (printed, silent) = _finish(*pair)
  assert codes == [128 + signal.SIGTERM] * 2, printed
  assert "resuming from the checkpoint of step" in printed
  assert "resuming" not in silent

  codes, (printed, _) = _finish(*_start_two(texts, tmp_path / "pair"))
  assert codes == [0, 0], printed
  losses, expected = _losses(tmp_path / "pair"), _losses(tmp_path / "alone")
  assert list(losses) == list(range(1, 61))
  assert {step: losses[step] for step in before} == before  # bit for bit, in the same two processes
  np.testing.assert_allclose(
    [losses[step] for step in range(1, 11)], [expected[step] for step in range(1, 11)], rtol=1e-5
  )
  places = [tmp_path / name / "checkpoints" / "60" / "data" / "metadata" for name in ("alone", "pair")]
  assert places[0].read_text() == places[1].read_text()  # of all shards, whichever process drew from them
  np.testing.assert_allclose(losses[60], expected[60], rtol=1e-2)  # rounding errors grow as training goes on


@pytest.mark.slow
def test_processes_that_would_train_something_else_are_refused(texts, tmp_path):
  pair = _start_two(texts, tmp_path / "run")
  pair[1].kill()
  pair[1].communicate()
  port = next(flag for flag in pair[0].args if flag.startswith("--coordinator"))
  other = _start(texts, tmp_path / "run", port, "--num_processes=2", "--process_id=1", "--config.train.seed=1")
  codes, printed = _finish(pair[0], other)
  assert codes == [2, 2]
  assert all("the settings or the data are not the same in all processes: process 1" in text for text in printed)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--coordinator=localhost"], "--coordinator must be HOST:PORT"),
    (["--coordinator=localhost:1234"], "--coordinator without --num_processes, --process_id"),
    (["--coordinator=localhost:1234", "--num_processes=2", "--process_id=2"], "--process_id=2 must be below"),
  ],
)
def test_mistyped_processes_are_named(door, texts, tmp_path, flags, message):
  done = door("train", *FLAGS, f"--config.data.paths={texts}", f"--workdir={tmp_path / 'run'}", *flags)
  assert done.returncode == 2
  assert message in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_job_has_its_workdir_alone_and_a_closed_terminal_stops_it(texts, tmp_path):
  workdir, long = tmp_path / "run", ["--config.train.steps=1000000", "--config.train.checkpoint_every=1000000"]
  pair = _start_two(texts, workdir, *long)
  _wait_for(workdir / metrics.JSONL, *pair)
  _wait_for_steps(workdir, 3, *pair)  # then both are in theirs
  holder = json.loads((workdir / lock.FILE).read_text())["pid"]
  assert holder == pair[0].pid
  codes, printed = _finish(*_start_two(texts, workdir, *long))
  assert codes == [1, 1]
  assert all(f"error: another process trains in {workdir}: pid {holder} on " in text for text in printed)
  pair[1].send_signal(signal.SIGHUP)
  codes, (printed, _) = _finish(*pair)
  assert codes == [128 + signal.SIGTERM] * 2, printed
  (step,) = (path.name for path in (workdir / "checkpoints").iterdir())
  assert f"stopped at step {step}; " in printed
  assert not (workdir / lock.FILE).exists()
