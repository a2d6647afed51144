"""ssc reads all caches in the first steps of training: the steps of grm, under one schedule and one optimiser."""

import dataclasses
import functools

import jax
import pytest

from mc_jax.errors import ConfigError
from mc_jax.training import config as config_lib
from mc_jax.training import loop, metrics
from mc_jax.training.progress import Progress

_train = functools.partial(loop.train, devices=jax.devices()[:1])


def _config(tiny, **memory):
  memory = {"rule": "linear", "aggregation": "ssc", "top_k": 1, "segment_length": 4, **memory}
  return config_lib.replace(tiny(), {f"model.memory.{name}": value for name, value in memory.items()})


def _losses(workdir):
  return [record["loss"] for record in metrics.read(workdir)]


@pytest.mark.slow
def test_the_first_steps_are_those_of_grm_and_a_resumed_run_switches_where_it_would_have(tiny, tmp_path, monkeypatch):
  """Killed once on each side of the switch, which comes after step 4; checkpoints are of steps 3 and 6."""
  config, report = _config(tiny, dense_steps=4), Progress.report
  _train(config, tmp_path / "whole")
  _train(_config(tiny, aggregation="grm"), tmp_path / "grm")
  _train(_config(tiny, dense_steps=0), tmp_path / "ssc")
  whole, grm, ssc = (_losses(tmp_path / name) for name in ("whole", "grm", "ssc"))
  assert whole[:4] == grm[:4]
  assert whole[4] != grm[4] and whole[4] != ssc[4]
  assert whole[0] != ssc[0]

  def killed(self, record, at):
    report(self, record)
    if record["step"] == at:
      raise KeyboardInterrupt

  for at in (2, 5):
    with monkeypatch.context() as patch:
      patch.setattr(Progress, "report", functools.partialmethod(killed, at=at))
      with pytest.raises(KeyboardInterrupt):
        _train(config, tmp_path / "killed")
  _train(config, tmp_path / "killed")
  assert _losses(tmp_path / "killed") == whole


def test_how_many_there_are(tiny):
  assert _config(tiny).dense_steps == 2  # of 6
  decay = {"optimizer.decay_steps": 3}
  assert config_lib.replace(_config(tiny), decay).dense_steps == 1  # a prolonged run does not begin anew
  assert _config(tiny, dense_steps=5).dense_steps == 5
  for options in ({"aggregation": "grm"}, {"gate": "constant"}, {"gate": "uniform"}):
    assert _config(tiny, **options).dense_steps == 0, options
  transformer = dataclasses.replace(_config(tiny).model, pattern="attention")
  assert dataclasses.replace(_config(tiny), model=transformer).dense_steps == 0
  with pytest.raises(ConfigError, match=r"model.memory.dense_steps=3 has no effect with model.memory.gate='constant'"):
    _config(tiny, dense_steps=3, gate="constant").check()
  with pytest.raises(ConfigError, match=r"model.memory.dense_steps=-1 must be at least 0"):
    _config(tiny, dense_steps=-1).check()


@pytest.mark.slow
def test_a_run_may_change_them_and_is_told(tiny, tmp_path, capsys):
  config = config_lib.replace(_config(tiny, dense_steps=1), {"train.steps": 3})
  _train(config, tmp_path)
  assert "1 caches a token; all of them up to step 1" in capsys.readouterr().out
  _train(config_lib.replace(config, {"train.steps": 6, "model.memory.dense_steps": 5}), tmp_path)
  assert "all caches are read up to step 5; before, that was up to step 1" in capsys.readouterr().out
