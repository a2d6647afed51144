"""Figures of devices are found by what JAX calls them."""

import types

from mc_jax.parallel import chips


def test_peaks_are_known_by_the_device_kind():
  def peak(kind):
    return chips.peak_flops(types.SimpleNamespace(device_kind=kind))

  assert peak("TPU v5 lite") == peak("TPU v5e") == 197e12
  assert peak("TPU v5p") == peak("TPU v5") == 459e12
  assert peak("NVIDIA H100 80GB HBM3") == 989e12
  assert peak("cpu") is None
