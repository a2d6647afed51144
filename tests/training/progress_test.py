"""Plain lines where there is no terminal."""

import math

from mc_jax.training.progress import Progress, duration


def test_plain_lines_say_how_far_and_how_long(capsys):
  with Progress(10, 20) as progress:
    progress.report({"step": 15, "loss": 2 * math.log(2), "tokens_per_second": 1234.5, "mfu": 0.5})
    progress.report({"step": 20, "loss": 0.0, "tokens_per_second": 1.0, "validation_bits_per_byte": 2.5})
  first, last = capsys.readouterr().out.splitlines()
  assert first == "step 15/20: 2.000 bits per byte, 1,234 tokens/s, MFU 50.0%, 0:00 left"
  assert "validation 2.500" in last


def test_duration():
  assert [duration(s) for s in (0.2, 59.6, 3661)] == ["0:00", "1:00", "1:01:01"]
