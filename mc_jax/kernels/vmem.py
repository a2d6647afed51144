"""How much VMEM a kernel may plan with."""

from jax.experimental.pallas import tpu as pltpu

# Chips that are not known while tracing are taken for one of these 64 MiB (v5p, 7x); v5e and v6e have 128, v4 has 16.
_UNKNOWN_CHIP = 64 << 20


def capacity() -> int:
  """Bytes of VMEM of a core of the chip that is traced for.

  The chip is that of the mesh in context (`jax.set_mesh`, which is how ahead-of-time compiles name it), or else the
  default device's.
  """
  return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else _UNKNOWN_CHIP


def budget() -> int:
  """Bytes that blocks, scratch and a kernel's intermediate values may take together.

  What is left is for the compiler: what XLA itself keeps in VMEM around the kernel.
  """
  return capacity() * 15 // 16
