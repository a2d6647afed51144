"""Runs that are killed or stopped go on as if nothing had happened; bad input starts nothing."""

import dataclasses
import functools
import signal
import sys

import jax
import pytest
from marks import slow

from mc_jax.errors import ConfigError
from mc_jax.training import loop, metrics
from mc_jax.training.progress import Progress

_train = functools.partial(loop.train, devices=jax.devices()[:1])


class Killed(BaseException):
  """Stands for a kill: nothing of ours handles it."""


def _losses(workdir):
  return [(record["step"], record["loss"], record["grad_norm"]) for record in metrics.read(workdir)]


def _at_report(monkeypatch, step, action):
  """Does `action` when the record of `step` has been written, before any checkpoint of it."""
  report = Progress.report

  def reporting(self, record):
    report(self, record)
    if record["step"] == step:
      action()

  monkeypatch.setattr(Progress, "report", reporting)


def _kill():
  raise Killed


@pytest.mark.parametrize(
  "fields",
  [
    {"pattern": "attention"},
    slow({"pattern": "attention", "microbatches": 2, "log_every": 2}),
    slow({"microbatches": 2, "documents": True}),
  ],
  ids=["transformer", "accumulated", "memory_caching"],
)
def test_a_killed_run_resumes_bit_for_bit(tiny, tmp_path, monkeypatch, fields):
  """Killed after logging step 4 or 5, resumed from the checkpoint of step 3."""
  config = tiny(**fields)
  whole = _train(config, tmp_path / "whole")
  with monkeypatch.context() as patch:
    _at_report(patch, 4 if config.train.log_every == 2 else 5, _kill)
    with pytest.raises(Killed):
      _train(config, tmp_path / "killed")
  assert _losses(tmp_path / "killed")[-1][0] > 3
  resumed = _train(config, tmp_path / "killed")
  assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")
  assert [step for step, *_ in _losses(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
  assert resumed == whole


def test_a_signal_stops_with_a_checkpoint_and_the_same_command_goes_on(tiny, tmp_path, monkeypatch):
  config = tiny(pattern="attention")
  whole = _train(config, tmp_path / "whole")
  with monkeypatch.context() as patch:
    _at_report(patch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    stopped = _train(config, tmp_path / "stopped")
  assert (stopped.step, stopped.stopped_by) == (2, signal.SIGTERM)
  assert (tmp_path / "stopped" / "checkpoints" / "2").is_dir()
  assert _train(config, tmp_path / "stopped") == whole
  assert _losses(tmp_path / "stopped") == _losses(tmp_path / "whole")


def test_a_run_leaves_everything_in_its_workdir_and_can_be_prolonged(tiny, tmp_path, capsys):
  config = tiny(pattern="attention", sample_length=5)
  first = _train(config, tmp_path)
  names = {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "loss.png", "report.txt", "sample.txt"}
  assert {path.name for path in tmp_path.iterdir()} == names
  assert "byte bigram" in capsys.readouterr().out
  assert _train(config, tmp_path) == first  # nothing left to do: only reported again
  longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8))
  assert _train(longer, tmp_path).step == 8
  printed = capsys.readouterr().out
  assert "train.steps was 6 and is now 8" in printed
  assert "to keep the decay finished: --config.optimizer.decay_steps=6" in printed
  assert [step for step, *_ in _losses(tmp_path)] == list(range(1, 9))


@pytest.mark.slow
def test_losses_that_are_not_finite_end_the_run_and_keep_the_checkpoint(tiny, tmp_path):
  config = tiny(pattern="attention", steps=3, max_skipped=2)
  _train(config, tmp_path)
  optimizer = dataclasses.replace(config.optimizer, learning_rate=1e30, warmup_steps=0)
  train = dataclasses.replace(config.train, steps=9)
  with pytest.raises(metrics.Diverged, match=r"step [5-9]: the loss or its gradient is not finite"):
    _train(dataclasses.replace(config, optimizer=optimizer, train=train), tmp_path)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] == ["3"]


def _memory(config, **fields):
  memory = dataclasses.replace(config.model.memory, **fields)
  return dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory))


BAD = {
  "segment": (lambda c: _memory(c, segment_length=0), "model.memory.segment_length"),
  "chunk": (lambda c: _memory(c, chunk=-1), "model.memory.chunk"),
  "top_k": (lambda c: _memory(c, top_k=0), "model.memory.top_k"),
  "rule": (lambda c: _memory(c, rule="delta"), "linear, swla, dla, titans"),
  "aggregation": (lambda c: _memory(c, aggregation="sum"), "none, residual, grm, soup, ssc"),
  "heads": (lambda c: _model(c, heads=3), "use one of 1, 2, 4, 8, 16"),
  "glob": (lambda c: _data(c, paths="nowhere/*.txt"), "no file matches 'nowhere/*.txt'"),
  "split": (lambda c: _data(c, validation_fraction=1e-9), "the validation split would be empty"),
  "text": (lambda c: _data(c, paths=f"{c.data.paths},{sys.executable}"), "is not text"),
  "length": (lambda c: _data(c, length=10**6), "data.length=1000000 is longer than"),
  "model": (lambda c: _model(c, layers=2), "model.layers: 1 in the checkpoint, 2 now"),
}


def _model(config, **fields):
  return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def _data(config, **fields):
  return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
  """Holds a run of one step."""
  folder = tmp_path_factory.mktemp("run")
  _train(tiny(pattern="attention", steps=1), folder)
  return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_compiles_and_nothing_is_lost(tiny, workdir, case):
  break_it, message = BAD[case]
  config = break_it(tiny(pattern="attention", steps=1))
  before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
  compiled = []

  def listen(event, duration, **_):
    if "backend_compile" in event:
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    with pytest.raises(ConfigError) as raised:
      _train(config, workdir)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert message in str(raised.value)
  assert compiled == []
  assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
