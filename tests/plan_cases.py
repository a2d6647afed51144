"""What a TPU's compiler is asked about kernels at head_dim 256, that of the 1.3B models, and about splash attention.

As tests/tpu_cases.py, for the rates that plans are made with (mc_jax/planning/chips.py):

  python tests/tpu_schedule.py tests/plan_cases.py:titans_write_fwd --topology v5e:2x2
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp

from mc_jax.parallel import attention

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tpu_cases

_NAMES = ("titans_write", "cached_read_deep", "selected_read")
for _name in (f"{name}_{direction}" for name in _NAMES for direction in ("fwd", "bwd")):
  globals()[_name] = functools.partial(getattr(tpu_cases, _name), head_dim=256)


def splash(head_dim):
  """Splash attention's three kernels, FLOPs of one tile of 512 queries and 512 keys."""
  x = tpu_cases.array(tpu_cases.BATCH, tpu_cases.LENGTH, tpu_cases.HEADS, head_dim, dtype=jnp.bfloat16)
  document = tpu_cases.array(tpu_cases.BATCH, tpu_cases.LENGTH, dtype=jnp.int32)

  def gradients(q, k, v, document, cotangent):
    return jax.vjp(lambda *qkv: attention.attention(*qkv, document), q, k, v)[1](cotangent)

  product = 2 * 512 * 512 * head_dim
  kernels = {"fwd_segmented_residuals": 2, "dq_segmented_no_residuals": 3, "dkv_segmented_no_residuals": 4}
  flops = {f"splash_mha_{name}": products * product for name, products in kernels.items()}
  return gradients, (x, x, x, document, x), flops


def splash_128():
  return splash(128)


def splash_256():
  return splash(256)
