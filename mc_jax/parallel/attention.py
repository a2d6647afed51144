"""Causal softmax attention across devices: batch and heads are split, and with the axis "context" the queries too.

On TPUs it is JAX's splash attention, a Pallas kernel for which no [length, length] array exists; elsewhere XLA's. Where
the sequence is split, each device gathers the keys, values and document numbers of all of it for its queries. Nothing
evens out the causal mask: the last device has the most to do.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from mc_jax.parallel import axes
from mc_jax.parallel import mesh as meshes

_BLOCKS = (512, 256, 128)  # tokens in a tile of queries, and in one of keys: the first that divides


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, document: jax.Array | None = None, *, interpret: bool = False
) -> jax.Array:
  """softmax(q k^T / sqrt(head_dim)) v over earlier tokens of the same document, on the mesh that is set.

  Args:
    q, k, v: [batch, length, heads, head_dim].
    document: [batch, length] int32, number of each token's document; None: a row is one. Tokens of one number see each
      other whatever it is, padding too.
    interpret: run the kernel off TPU too, interpreted: for tests.

  Returns:
    [batch, length, heads, head_dim] in q's dtype.
  """
  batch, length, heads, _ = q.shape
  sizes = meshes.sizes_in_context()
  spec = axes.spec(axes.HEADS, sizes, q.shape)
  parts = sizes["context"] if spec[1] else 1
  if document is None:
    document = jnp.ones((batch, length), jnp.int32)
  kernel = _splash(length, heads // sizes["model"] if spec[2] else heads, parts, interpret)
  if all(size == 1 for size in sizes.values()):
    return _local(q, k, v, document, kernel, None, interpret)

  tokens = jax.P(*spec[:2])
  specs = (spec, spec, spec, tokens, kernel and _kernel_specs(kernel, spec[1]))
  local = functools.partial(_local, context=spec[1], interpret=interpret)
  # Pallas kernels have no rule that says along which axes their results vary: nothing is checked.
  return jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, document, kernel)


def kernel_flops(name: str, shapes: Sequence[tuple[int, ...]]) -> float | None:
  """FLOPs of a call of one of splash attention's kernels, on the device that has the most to do.

  The kernels have no `pl.CostEstimate`. See `hlo_cost.cost`.

  Args:
    name: of the kernel.
    shapes: of its operands.
  """
  products = next((n for part, n in {"_fwd": 2, "_dq": 3, "_dkv": 4}.items() if part in name), None)
  if not name.startswith("splash") or products is None:
    return None
  # Queries and keys come first among operands of the form of the largest; the kernel's tables are small.
  largest = max(shapes, key=math.prod)
  form = [s for s in shapes if len(s) == len(largest) and s[-1] == largest[-1] and s[-2] % _BLOCKS[-1] == 0]
  (*rows, queries, head_dim), (*_, keys, _) = form[:2]
  block = _block(queries)
  n, all_keys = queries // block, keys // block
  tiles = n * (all_keys - n) + n * (n + 1) // 2  # those on the diagonal are computed whole
  return 2 * products * tiles * block**2 * head_dim * math.prod(rows)


def _local(q, k, v, document, kernel, context, interpret):
  """Attention of the queries that are here. context: the mesh axis along which the sequence is split, or None."""
  keys = document
  if context:
    k, v, keys = (jax.lax.all_gather(x, context, axis=1, tiled=True) for x in (k, v, document))
  by_xla = functools.partial(_by_xla, context)
  by_splash = functools.partial(_by_splash, kernel)
  arrays = q, k, v, document, keys
  if kernel is None:
    return by_xla(*arrays)
  return by_splash(*arrays) if interpret else jax.lax.platform_dependent(*arrays, tpu=by_splash, default=by_xla)


def _by_splash(kernel, q, k, v, document, keys):
  q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
  return jnp.moveaxis(jax.vmap(kernel)(q, k, v, splash.SegmentIds(document, keys)), 1, 2)


def _by_xla(context, q, k, v, document, keys):
  first = jax.lax.axis_index(context) * q.shape[1] if context else 0
  earlier = first + jnp.arange(q.shape[1])[:, None] >= jnp.arange(k.shape[1])
  mask = earlier & (document[:, :, None] == keys[:, None, :])
  return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def _block(length: int) -> int | None:
  """Tokens in a tile; None if no tile divides the length."""
  return next((block for block in _BLOCKS if length % block == 0), None)


def _splash(length: int, heads: int, parts: int, interpret: bool) -> Callable | None:
  """The kernel for a device's heads and one of so many parts of the queries; None where tiles do not fit."""
  block = _block(length // parts)
  if block is None:
    return None
  mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
  names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
  sizes = splash.BlockSizes(**dict.fromkeys(names, block))
  return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=parts, interpret=interpret)


def _kernel_specs(kernel, context):
  """How the kernel's tables of tiles are split: by queries, along the axis `context`."""
  mesh = jax.sharding.get_abstract_mesh()
  return kernel.manual_sharding_spec(jax.sharding.NamedSharding(mesh, jax.P(None, context)))
