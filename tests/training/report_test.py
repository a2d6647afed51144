"""The table lines up, the curve is a picture."""

from mc_jax.training import report


def test_table():
  assert report.table({"a": "1", "long name": "2"}, "title") == "title\n  a          1\n  long name  2"


def test_curve_of_any_number_of_records(tmp_path):
  for count in (0, 1, 120):
    records = [{"step": s, "loss": 5.0 / s} for s in range(1, count + 1)]
    if count:
      records[-1]["validation_bits_per_byte"] = 2.0
    path = tmp_path / f"{count}.png"
    report.curve(path, records, {"byte bigram": 3.5})
    assert path.read_bytes().startswith(b"\x89PNG")
