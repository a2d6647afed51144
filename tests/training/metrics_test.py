"""metrics.jsonl holds every step once, and what is finite of it."""

import jax
import jax.numpy as jnp
import pytest

from mc_jax.training import metrics


def test_a_run_that_goes_on_drops_what_came_after_its_checkpoint(tmp_path):
  with metrics.MetricsLog(tmp_path, 0) as log:
    log.write([{"step": s, "loss": 10.0 - s} for s in range(1, 6)])
  with metrics.MetricsLog(tmp_path, 3) as log:
    log.write([{"step": s, "loss": 10.0 - s} for s in range(4, 8)])
  assert metrics.read(tmp_path) == [{"step": s, "loss": 10.0 - s} for s in range(1, 8)]
  assert list((tmp_path / metrics.TENSORBOARD).iterdir())


def test_a_torn_last_line_is_left_out(tmp_path):
  with metrics.MetricsLog(tmp_path, 0) as log:
    log.write([{"step": 1, "loss": 2.0}])
  with (tmp_path / metrics.JSONL).open("a") as file:
    file.write('{"step": 2, "lo')
  assert metrics.read(tmp_path) == [{"step": 1, "loss": 2.0}]
  with metrics.MetricsLog(tmp_path, 2) as log:
    log.write([{"step": 2, "loss": 1.0}])
  assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2]


def test_the_meter_gives_a_record_for_each_step_and_the_speed():
  meter = metrics.Meter(tokens=100, devices=jax.devices()[:1])
  for step in (5, 6):
    meter.add(step, {"loss": jnp.float32(step), "grad_norm": jnp.float32(1), "skipped": jnp.int32(0)})
  first, last = meter.collect()
  assert first == {"step": 5, "loss": 5.0, "grad_norm": 1.0}
  assert last["tokens_per_second"] == pytest.approx(100 / last["step_time"])
  assert meter.tokens_per_second == pytest.approx(last["tokens_per_second"])
  assert "mfu" not in last


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_records_of_skipped_updates_hold_what_is_finite(value):
  meter = metrics.Meter(tokens=1, devices=jax.devices()[:1])
  meter.add(7, {"loss": 1.0, "grad_norm": 1.0, "skipped": 0})
  meter.add(8, {"loss": 1.0, "grad_norm": value, "skipped": 1})
  first, second = meter.collect()
  assert first == {"step": 7, "loss": 1.0, "grad_norm": 1.0}
  assert (second["loss"], second["skipped"]) == (1.0, 1)
  assert "grad_norm" not in second
