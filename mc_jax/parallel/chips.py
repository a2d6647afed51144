"""What devices can do: figures that turn FLOPs and bytes into estimated times, and times into utilisation.

Peaks, capacities and the links' speeds are those of the "System architecture" tables of https://cloud.google.com/tpu/docs
(/v4, /v5e, /v5p, /v6e, /tpu7x). A link's speed is a chip's "bidirectional inter-chip interconnect bandwidth" over twice
its ports, four in a 2D torus and six in a 3D one; v4's, which its page lacks, https://arxiv.org/abs/2304.01433 (6 links
of 50 GB/s). Clocks are what the compiler's cycles imply: the peak over the FLOPs of its fastest schedules in a cycle,
131,072 a core up to v5p and 524,288 a core after.
"""

import collections
import dataclasses
from collections.abc import Collection, Sequence

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device of JAX's, which is a whole chip or one of its cores.

  Attributes:
    name: as in topologies, "v5p".
    flops: peak, bfloat16, per second.
    hbm_bytes: capacity.
    hbm_bandwidth: bytes per second.
    link: bytes per second of one link in one direction; a chip has two links along every axis of the torus.
    axes: of the torus, 2 or 3.
    clock: cycles per second, of the compiler's estimates.
    wraps: an axis whose number of chips is a multiple of this is a ring; any other is a line.
    network: bytes per second and chip that leave a slice through the data-centre network.
    wide: matrix units are 256 x 256, not 128 x 128.
  """

  name: str
  flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link: float
  axes: int
  clock: float
  wraps: int
  network: float
  wide: bool = False

  def ring(self, coordinates: Collection[tuple[int, ...]], whole: Sequence[int]) -> float:
    """Bytes per second that each chip of a group can send in a ring, or rings, through all of them.

    Every axis of the torus along which the group lies adds its two links, where the axis is closed; where it is a line,
    what goes round must come back the same way, and the axis counts half. Groups that share links are not seen.

    Args:
      coordinates: of the group's chips.
      whole: the slice's extent along each axis.
    """
    total = 0.0
    for axis, extent in enumerate(whole):
      along = len({at[axis] for at in coordinates})
      if along > 1:
        closed = along == extent and extent % self.wraps == 0
        total += self.link * (2 if closed else 1)
    return total or 2 * self.link * self.axes  # one chip's own cores


# Data-centre network: v5p's page has 50 Gbit/s a chip, v5e's and v6e's the bandwidth of a pod of 256; the others' pages
# have none, and are taken for v5p's.
_CHIPS = {
  "TPU v4": Chip("v4", 275e12, 32 * GIB, 1200e9, 50e9, 3, 1.05e9, 4, 6.25e9),
  "TPU v5 lite": Chip("v5e", 197e12, 16 * GIB, 819e9, 50e9, 2, 1.5e9, 16, 6.4e12 / 8 / 256),
  "TPU v5": Chip("v5p", 459e12, 95 * GIB, 2765e9, 100e9, 3, 1.75e9, 4, 6.25e9),
  "TPU v6 lite": Chip("v6e", 918e12, 32 * GIB, 1638e9, 100e9, 2, 1.75e9, 16, 25.6e12 / 8 / 256, True),
  "TPU7x": Chip("tpu7x", 2307e12, 192 * GIB, 7380e9, 100e9, 3, 2.2e9, 4, 6.25e9, True),
}


def of(devices: Sequence[jax.Device]) -> Chip:
  """What one of these devices can do: of a chip whose cores are devices of their own, a core's share.

  Raises:
    ValueError: devices that are not TPUs, or that the table lacks.
  """
  kind = devices[0].device_kind
  if kind not in _CHIPS:
    raise ValueError(f"no figures for {kind!r}: the table has {', '.join(_CHIPS)}")
  chip = _CHIPS[kind]
  cores = max(collections.Counter((getattr(d, "slice_index", 0), *d.coords) for d in devices).values())
  shared = ("flops", "hbm_bytes", "hbm_bandwidth", "link", "network")
  return dataclasses.replace(chip, **{field: getattr(chip, field) / cores for field in shared})


# What JAX also calls these chips, and the peaks of devices that are trained on but not planned for, by the vendors.
_NAMES = {"TPU v5e": "TPU v5 lite", "TPU v6": "TPU v6 lite", "TPU7": "TPU7x", "TPU v7": "TPU7x"}
_PEAKS = {"TPU v2": 45e12, "TPU v3": 123e12, "A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def peak_flops(device: jax.Device) -> float | None:
  """Peak dense bfloat16 FLOP/s of a device, by a part of its device_kind; None where it is unknown, as on a CPU."""
  peaks = {name: _CHIPS[kind].flops for name, kind in _NAMES.items()}
  peaks |= {kind: chip.flops for kind, chip in _CHIPS.items()} | _PEAKS
  return next((peak for name, peak in peaks.items() if name in device.device_kind), None)


def extent(devices: Sequence[jax.Device]) -> tuple[int, ...]:
  """Chips along each axis of a slice."""
  return tuple(max(at) - min(at) + 1 for at in zip(*(device.coords for device in devices), strict=True))


def sent(kind: str, put: float, got: float, group: int) -> float:
  """Bytes that each device sends in a collective, by the ring algorithm.

  Args:
    kind: HLO's name, "all-gather", "all-reduce", "collective-permute", ...
    put, got: bytes that a device puts in and gets out.
    group: devices that take part.
  """
  share = (group - 1) / group
  match kind:
    case "all-reduce":
      return 2 * share * put
    case "all-gather":
      return share * got
    case "reduce-scatter" | "all-to-all" | "ragged-all-to-all":
      return share * put
  return put


def seconds(chip: Chip, kind: str, sent: float, group: Sequence[jax.Device], whole: Sequence[int]) -> float:
  """The time for each device of a group to send `sent` bytes over idle links.

  Args:
    group: the devices that take part.
    whole: the extent of their slice.
  """
  if len({getattr(device, "slice_index", 0) for device in group}) > 1:
    return sent / chip.network
  if kind.startswith("collective-permute"):
    return sent / chip.link
  coordinates = {tuple(device.coords) for device in group}
  # What is sent to all others passes, in the mean, a quarter of each ring.
  hops = max(1.0, max(len(set(along)) for along in zip(*coordinates, strict=True)) / 4) if "all-to-all" in kind else 1.0
  return sent * hops / chip.ring(coordinates, whole)


# What kernels do, as a share of what a plain matmul kernel does in that time (taken for the peak), by their
# static schedules at head_dim 128 and at 256: {part of the name: (v5e at 128, at 256; v6e at 128, at 256)}. The first
# that fits counts (gated_deltanet's comes before deltanet's); v4 and v5p have v5e's matrix units and are taken for it,
# tpu7x for v6e. docs/plan.md says how they were measured.
_RATES = {
  "linear_write_fwd": (0.385, 0.385, 0.140, 0.140),  # at 256 not measured
  "linear_write_bwd": (0.605, 0.605, 0.247, 0.247),
  "swla_write_fwd": (0.385, 0.385, 0.140, 0.140),  # not measured: as linear's
  "swla_write_bwd": (0.605, 0.605, 0.247, 0.247),
  "retnet_write_fwd": (0.133, 0.281, 0.054, 0.118),
  "retnet_write_bwd": (0.164, 0.355, 0.071, 0.147),
  "mamba2_write_fwd": (0.134, 0.280, 0.055, 0.118),
  "mamba2_write_bwd": (0.163, 0.351, 0.069, 0.146),
  "gla_write_fwd": (0.281, 0.440, 0.115, 0.189),
  "gla_write_bwd": (0.334, 0.506, 0.138, 0.230),
  "gated_deltanet_write_fwd": (0.165, 0.253, 0.068, 0.105),
  "gated_deltanet_write_bwd": (0.207, 0.303, 0.091, 0.128),
  "momentum_deltanet_write_fwd": (0.177, 0.297, 0.074, 0.138),
  "momentum_deltanet_write_bwd": (0.200, 0.332, 0.086, 0.152),
  "deltanet_write_fwd": (0.187, 0.282, 0.072, 0.113),
  "deltanet_write_bwd": (0.230, 0.330, 0.094, 0.141),
  "kda_write_fwd": (0.234, 0.361, 0.095, 0.149),
  "kda_write_bwd": (0.268, 0.392, 0.111, 0.165),
  "mlstm_write_fwd": (0.104, 0.206, 0.045, 0.103),
  "mlstm_write_bwd": (0.106, 0.235, 0.048, 0.106),
  "gdn2_write_fwd": (0.234, 0.366, 0.095, 0.149),
  "gdn2_write_bwd": (0.268, 0.401, 0.111, 0.163),
  "rwkv7_write_fwd": (0.307, 0.460, 0.124, 0.202),
  "rwkv7_write_bwd": (0.342, 0.482, 0.141, 0.212),
  "write_fwd": (0.520, 0.698, 0.237, 0.445),  # titans', and dla's, not measured
  "write_bwd": (0.629, 0.797, 0.342, 0.583),
  "cached_read_fwd": (0.606, 0.814, 0.263, 0.602),  # matrix and deep memories share a name: at 128 the slower
  "cached_read_bwd": (0.610, 0.803, 0.322, 0.697),
  "selected_read_fwd": (0.488, 0.756, 0.174, 0.453),
  "selected_read_bwd": (0.525, 0.824, 0.245, 0.594),
  "splash_mha_fwd": (0.392, 0.502, 0.179, 0.325),
  "splash_mha_dkv": (0.609, 0.695, 0.312, 0.543),
  "splash_mha_dq": (0.660, 0.711, 0.294, 0.541),
}
_OTHERS = (0.40, 0.40, 0.19, 0.19)  # a guess, at the lower end


def kernel_rate(name: str, chip: Chip, head_dim: int = 128) -> float:
  """The share of the chip's peak that a Pallas kernel of this name is taken to reach.

  Rates are of FLOPs that are all of use: at a head_dim of 96, a quarter of the lanes has none.
  """
  rates = next((rates for part, rates in _RATES.items() if part in name), _OTHERS)
  return rates[2 * chip.wide + (head_dim >= 256)] * head_dim / (-(-head_dim // 128) * 128)
