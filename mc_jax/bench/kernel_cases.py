"""Kernels to compile for TPUs with schedule.py: functions that return (fn, args, {kernel: FLOPs of a grid step}).

Without arguments they have the shapes of docs/kernels.md: batch x heads 32, length 4,096, head_dim 128, expansion 4,
segments (and here chunks) of 256 tokens, bfloat16 inputs, float32 states. FLOPs are those of matrix products, two per
multiply-add, including what a backward kernel recomputes. NAME_256 is the case at head_dim 256, as in the 1.3B models.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import megablox

from mc_jax.kernels import cost, gated_sum, grouped, rows
from mc_jax.memory import aggregate, arithmetic, networks, pallas, rules, segments, xla
from mc_jax.memory.tokens import Tokens
from mc_jax.parallel import attention

BATCH, HEADS, LENGTH, SEGMENT, EXPANSION, TOP_K = 4, 8, 4096, 256, 4, 2
ROWS, CACHES = BATCH * HEADS, LENGTH // SEGMENT - 1
NETWORKS = {"matrix": networks.Matrix(), "deep": networks.MLP(2, EXPANSION)}
# Cached memories that one grid step reads, as gated_sum chooses for these shapes, forward and backward.
TOGETHER = {"matrix": (8, 4), "deep": (2, 1)}


def array(*shape, dtype=jnp.float32):
  """The shape and dtype of an argument."""
  return jax.ShapeDtypeStruct(shape, dtype)


def reading(rule):
  """A token's read of its online memory."""
  return lambda memory, x: rule.network(x, lambda name, z: memory.read(name, z, jnp.bfloat16))


def write(rule, head_dim, *, carries=True):
  """The write pass: (a function of M_0 and tokens, its arguments)."""
  vector = array(BATCH, HEADS, LENGTH, head_dim, dtype=jnp.bfloat16)
  gates = {name: array(BATCH, HEADS, LENGTH, *[head_dim] * gate.per_channel) for name, gate in rule.gates.items()}
  fresh = jax.eval_shape(lambda: rule.init(jax.random.key(0), heads=HEADS, head_dim=head_dim))

  def fn(fresh, tokens):
    lengths = segments.constant(SEGMENT).lengths(LENGTH)
    written = pallas.write(rule, fresh, tokens, lengths, read=reading(rule), carries=carries, side_by_side=1)
    return written.y, written.states.memory

  return fn, (fresh, Tokens(vector, vector, vector, None, gates))


def write_flops(rule, head_dim):
  """FLOPs of a chunk's forward step, counted as in the kernel's own estimate."""
  vector = array(1, 1, rule.chunk, head_dim, dtype=jnp.bfloat16)
  gates = {name: array(1, 1, rule.chunk, *[head_dim] * gate.per_channel) for name, gate in rule.gates.items()}
  fresh = jax.eval_shape(lambda: rule.init(jax.random.key(0), heads=1, head_dim=head_dim))
  state = jax.eval_shape(rule.start, fresh, vector)
  tokens = Tokens(vector, vector, vector, None, gates)
  step = functools.partial(xla.write_chunk, rule, reading(rule), solve=arithmetic.solve_in_kernel)
  return cost.work(step, fresh, state, tokens).flops


def forward(rule, head_dim):
  """The write pass, with the FLOPs of its forward kernel."""
  fn, args = write(rule, head_dim)
  return fn, args, {f"{rule.name}_write_fwd": write_flops(rule, head_dim)}


def backward(rule, head_dim):
  """Every product again, and two more for its gradients; the forward kernel beside it is not counted."""
  fn, args = write(rule, head_dim)
  out = jax.eval_shape(fn, *args)

  def gradients(args, cotangent):
    return jax.vjp(fn, *args)[1](cotangent)

  return gradients, (args, out), {f"{rule.name}_write_bwd": 3 * write_flops(rule, head_dim)}


def titans_printed_write_fwd(head_dim=128, chunk=256):
  """The forward write kernel of Titans as printed."""
  return forward(rules.get("titans", chunk=chunk, normalized=False), head_dim)


def titans_printed_write_bwd(head_dim=128, chunk=256):
  """The backward write kernel of Titans as printed."""
  return backward(rules.get("titans", chunk=chunk, normalized=False), head_dim)


def titans_write_fwd(head_dim=128, chunk=256):
  """The forward write kernel of Titans with its default options."""
  return forward(rules.get("titans", chunk=chunk), head_dim)


def titans_write_bwd(head_dim=128, chunk=256):
  """The backward write kernel of Titans with its default options."""
  return backward(rules.get("titans", chunk=chunk), head_dim)


def linear_write_fwd(head_dim=128, chunk=256):
  """The forward write kernel of linear attention."""
  return forward(rules.get("linear", chunk=chunk), head_dim)


def linear_write_bwd(head_dim=128, chunk=256):
  """The backward write kernel of linear attention."""
  return backward(rules.get("linear", chunk=chunk), head_dim)


def _recurrence(make, name):
  """The write pass of a recurrence with a matrix memory, in chunks of 128 tokens."""
  return lambda head_dim=128, chunk=128: make(rules.get(name, chunk=chunk), head_dim)


RECURRENCES = (
  *("retnet", "mamba2", "gla", "deltanet", "gated_deltanet", "kda"),
  *("mlstm", "momentum_deltanet", "gdn2", "rwkv7"),
)
for _rule in RECURRENCES:
  globals()[f"{_rule}_write_fwd"] = _recurrence(forward, _rule)
  globals()[f"{_rule}_write_bwd"] = _recurrence(backward, _rule)


def states(kind, head_dim, dtype):
  """Stacked memories of every row, [caches, rows, in, out]."""
  weights = jax.eval_shape(lambda: NETWORKS[kind].init(jax.random.key(0), ROWS, head_dim))
  return {name: array(CACHES, *w.shape, dtype=dtype) for name, w in weights.items()}


def read_flops(memories, tokens):
  """FLOPs of reading one memory for `tokens` tokens."""
  return 2 * tokens * sum(w.shape[2] * w.shape[3] for w in memories.values())


def cached_read_fwd(kind, head_dim):
  """The gated read of all cached memories of NETWORKS[kind]."""
  contribution, memories = aggregate.ReadNetwork(NETWORKS[kind]), states(kind, head_dim, jnp.bfloat16)
  x, gates = array(ROWS, LENGTH, head_dim, dtype=jnp.bfloat16), array(CACHES, ROWS, LENGTH)
  tile = gated_sum.query_tile(contribution, x, memories)
  counts = np.arange(tile - 1, LENGTH, tile) // SEGMENT

  def fn(x, gates, memories):
    with jax.named_scope("memory_read"):
      return gated_sum.gated_sum(contribution, x, gates, memories, counts, tile)

  return fn, (x, gates, memories), {"cached_read_fwd": TOGETHER[kind][0] * read_flops(memories, tile)}


def cached_read_bwd(kind, head_dim):
  """The gradients of `cached_read_fwd`."""
  fn, args, flops = cached_read_fwd(kind, head_dim)
  forward, backward = TOGETHER[kind]

  def gradients(args, cotangent):
    return jax.vjp(fn, *args)[1](cotangent)

  y = jax.eval_shape(fn, *args)
  return gradients, (args, y), {"cached_read_bwd": 3 * flops["cached_read_fwd"] * backward // forward}


def cached_read_matrix_fwd(head_dim=128):
  """The gated read of cached matrices."""
  return cached_read_fwd("matrix", head_dim)


def cached_read_matrix_bwd(head_dim=128):
  """The gradients of the gated read of cached matrices."""
  return cached_read_bwd("matrix", head_dim)


def cached_read_deep_fwd(head_dim=128):
  """The gated read of cached two-layer networks."""
  return cached_read_fwd("deep", head_dim)


def cached_read_deep_bwd(head_dim=128):
  """The gradients of the gated read of cached two-layer networks."""
  return cached_read_bwd("deep", head_dim)


def selected_read_fwd(head_dim=128):
  """The read of the TOP_K two-layer networks that each token selects."""
  memories = states("deep", head_dim, jnp.float32)
  block = grouped.block_size(aggregate.ReadNetwork(NETWORKS["deep"]), head_dim, memories)
  blocks = LENGTH * TOP_K // block + CACHES  # enough, if the last block of every memory is not full
  x, owner = array(ROWS, blocks, block, head_dim, dtype=jnp.bfloat16), array(ROWS, blocks, dtype=jnp.int32)

  def fn(x, gates, owner, memories):
    with jax.named_scope("memory_read_selected"):
      return grouped.grouped(aggregate.ReadNetwork(NETWORKS["deep"]), x, gates, owner, memories)

  return fn, (x, array(ROWS, blocks, block), owner, memories), {"selected_read_fwd": read_flops(memories, block)}


def selected_read_bwd(head_dim=128):
  """The gradients of the read of selected networks."""
  fn, args, flops = selected_read_fwd(head_dim)

  def gradients(x, gates, owner, memories, cotangent):
    return jax.vjp(lambda x, gates, memories: fn(x, gates, owner, memories), x, gates, memories)[1](cotangent)

  return gradients, (*args, jax.eval_shape(fn, *args)), {"selected_read_bwd": 3 * flops["selected_read_fwd"]}


def selected_alternative(product):
  """The alternative to `grouped`: a grouped product per layer over sorted pairs, forward and backward."""
  memories = states("deep", 128, jnp.bfloat16)
  flat = {name: array(CACHES * ROWS, *w.shape[2:], dtype=w.dtype) for name, w in memories.items()}
  rows, sizes = ROWS * LENGTH * TOP_K, array(CACHES * ROWS, dtype=jnp.int32)

  def fn(x, sizes, memories, cotangent):
    def read(x, memories):
      def linear(name, z):
        return product(z.astype(x.dtype), memories[name], sizes)

      return NETWORKS["deep"](x, linear).astype(jnp.float32)

    y, pull = jax.vjp(read, x, memories)
    return y, pull(cotangent)

  return fn, (array(rows, 128, dtype=jnp.bfloat16), sizes, flat, array(rows, 128))


def selected_ragged():
  """The alternative with `jax.lax.ragged_dot`."""
  return selected_alternative(functools.partial(jax.lax.ragged_dot, preferred_element_type=jnp.float32))


def selected_megablox():
  """The alternative with the grouped product of megablox."""

  def product(x, w, sizes):
    return megablox.gmm(x, w, sizes, jnp.float32, (512, min(512, w.shape[1]), min(512, w.shape[2])))

  return selected_alternative(product)


# Memory layers: 32,768 tokens of a group of 8 devices, 4 heads x 32 rows a token, a device's slice of 1M values.
VALUES, TOKENS, HITS, WIDTH = 1 << 20, 8 * LENGTH, 128, 128
_READ = 8 * 2 * HITS * WIDTH  # FLOPs of a grid step, 8 tokens


def rows_sum_fwd():
  """The weighted sum of a table's rows."""
  args = array(VALUES, WIDTH), array(TOKENS, HITS, dtype=jnp.int32), array(TOKENS, HITS)
  return rows.weighted_sum, args, {"rows_sum_fwd": _READ}


def rows_scores_bwd():
  """The gradient of the weights."""
  args = array(VALUES, WIDTH), array(TOKENS, HITS, dtype=jnp.int32), array(TOKENS, WIDTH)
  return rows.scores, args, {"rows_scores_bwd": _READ}


def selected_grouped():
  """`grouped` itself, forward and backward, to compare the alternatives with."""
  fn, args, _ = selected_read_fwd()

  def run(x, gates, owner, memories, cotangent):
    y, pull = jax.vjp(lambda x, gates, memories: fn(x, gates, owner, memories), x, gates, memories)
    return y, pull(cotangent)

  return run, (*args, jax.eval_shape(fn, *args))


def splash(head_dim):
  """Splash attention's three kernels; FLOPs of one tile of 512 queries and 512 keys."""
  x, document = array(BATCH, LENGTH, HEADS, head_dim, dtype=jnp.bfloat16), array(BATCH, LENGTH, dtype=jnp.int32)

  def gradients(q, k, v, document, cotangent):
    return jax.vjp(lambda *qkv: attention.attention(*qkv, document), q, k, v)[1](cotangent)

  product = 2 * 512 * 512 * head_dim
  kernels = {"fwd_segmented_residuals": 2, "dq_segmented_no_residuals": 3, "dkv_segmented_no_residuals": 4}
  flops = {f"splash_mha_{name}": products * product for name, products in kernels.items()}
  return gradients, (x, x, x, document, x), flops


splash_128, splash_256 = functools.partial(splash, 128), functools.partial(splash, 256)
_AT_256 = ("titans_write", "titans_printed_write", "cached_read_deep", "selected_read")
for _name in (*_AT_256, *(f"{_rule}_write" for _rule in RECURRENCES)):
  for _direction in ("fwd", "bwd"):
    globals()[f"{_name}_{_direction}_256"] = functools.partial(globals()[f"{_name}_{_direction}"], head_dim=256)
