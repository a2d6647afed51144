"""Memory layers with product keys: sparse key-value parameters in place of a feed-forward network (arXiv:2412.09764).

A query finds k of n * n values by two codebooks of n half keys each: the key of value i1 * n + i2 is the two halves i1
and i2, its score the sum of theirs (arXiv:1907.05242). A pair of which neither half is among the best k cannot be among
the best k pairs, so that 2 n scores stand for n * n, exactly.

`lookup` and `read` are pure functions; `ProductKeys` is the layer, an entry of model.feed_forward.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mc_jax.memory import arithmetic
from mc_jax.models import layer, problems
from mc_jax.models.layer import PLAIN, Context, Work
from mc_jax.models.linear import Linear, parameter
from mc_jax.models.norms import RMSNorm
from mc_jax.models.value_table import read, row_gradients  # noqa: F401  (what readers of this module look for)
from mc_jax.parallel import axes, values

if TYPE_CHECKING:
  from mc_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ProductKeysConfig:
  """Memory layers and their table of values (arXiv:2412.09764)."""

  codebook: int = 256  # half keys in a codebook, n: the table has n * n values; 1024 is the paper's smallest
  heads: int = 4  # queries a token, each with two codebooks of its own; all read one table
  top_k: int = 32  # values that a head reads
  key_dim: int | None = None  # width of a query, two halves; even; None: d_model, at most 512
  value_dim: int | None = None  # width of a value; None: d_model
  plus: bool = True  # memory+: what is read is multiplied by a gate of x, and projected; False: it is added as it is
  qk_norm: bool = False  # RMSNorm of queries and keys, where training is unstable
  gate: bool = False  # what comes out is multiplied by a sigmoid of x
  shared: bool = True  # one table of values for all memory layers; False: a table each

  def problems(self, prefix: str = "product_keys") -> list[str]:
    """Everything wrong with these values, each line naming the field and the valid values."""
    found = list(problems.at_least(prefix, self, codebook=1, heads=1, top_k=1, key_dim=2, value_dim=1))
    if found:
      return found
    count = self.codebook**2
    if count > jnp.iinfo(jnp.int32).max:
      found.append(
        f"{prefix}.codebook={self.codebook} makes {count:,} values, more than int32 counts: use at most 46340"
      )
    if self.top_k > count:
      found.append(
        f"{prefix}.top_k={self.top_k} is more than the {count} values of {prefix}.codebook={self.codebook}: use at "
        f"most {count}, or a larger codebook"
      )
    if self.key_dim is not None and self.key_dim % 2:
      found.append(f"{prefix}.key_dim={self.key_dim} must be even: a query is two halves")
    return found


def lookup(queries: jax.Array, codebooks: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
  """The values whose keys fit each query best, and the softmax of their scores (arXiv:2412.09764, equation 1).

  The result is that of all n * n scores, q1 . K1[i1] + q2 . K2[i2], sorted: the best first, of equal ones the one with
  the lower row.

  Args:
    queries: [..., heads, key_dim].
    codebooks: [heads, 2, n, key_dim / 2]: each head's keys of the first half of a query, and of the second.
    top_k: Values to find, from 1 to n * n.

  Returns:
    weights: [..., heads, top_k], float32 at least; they sum to 1.
    rows: [..., heads, top_k] int32 in [0, n * n): i1 * n + i2.

  Raises:
    ValueError: Shapes that do not go together, an odd key_dim, or a top_k or n out of range.
  """
  heads, key_dim = queries.shape[-2:]
  n = codebooks.shape[-2]
  if key_dim % 2:
    raise ValueError(f"key_dim must be even, two halves, got queries {queries.shape}")
  if codebooks.shape != (heads, 2, n, key_dim // 2):
    raise ValueError(
      f"queries {queries.shape} need codebooks [heads, 2, n, key_dim / 2] = ({heads}, 2, n, {key_dim // 2}), "
      f"got {codebooks.shape}"
    )
  if n**2 > jnp.iinfo(jnp.int32).max:
    raise ValueError(f"codebooks of {n} keys make {n**2:,} rows, more than int32 counts: at most 46340 keys")
  if not 1 <= top_k <= n**2:
    raise ValueError(f"top_k must be from 1 to the {n**2} rows of two codebooks of {n} keys, got {top_k}")
  lead = queries.shape[:-2]
  halves = queries.reshape(-1, heads, 2, key_dim // 2).transpose(1, 2, 0, 3)
  scores = arithmetic.product(halves, jnp.swapaxes(codebooks, -1, -2), queries.dtype)  # [heads, 2, tokens, n]
  # What is named is kept for the backward pass whatever model.remat says: nothing is searched for, or read, twice.
  rows = checkpoint_name(_best(lax.stop_gradient(scores), top_k), layer.KEPT)
  chosen = jnp.stack([rows // n, rows % n], 1)
  weights = jax.nn.softmax(checkpoint_name(_picked(scores, chosen).sum(1), layer.KEPT), axis=-1)

  def back(x):  # [heads, tokens, k] to [..., heads, k]
    return jnp.moveaxis(x, 0, 1).reshape(*lead, heads, top_k)

  return back(weights), back(rows)


def _best(scores: jax.Array, k: int) -> jax.Array:
  """Rows of the k largest sums of scores [heads, 2, tokens, n], in order: [heads, tokens, k] int32."""
  n = scores.shape[-1]
  scores = jnp.where(scores == 0, 0, scores)  # -0 would be less than 0, and they tie
  # Without barriers XLA would join what follows to the search, and sort all of the scores. One for both fails in it.
  best, index = map(lax.optimization_barrier, lax.top_k(scores, min(k, n)))
  # Of the pairs of ranks (r1, r2), from 1, those with r1 * r2 > k have at least k above them. The others lie under a
  # hyperbola: 119 for k = 32, and not 1,024.
  pairs = np.array([(r, s) for r in range(min(k, n)) for s in range(min(k // (r + 1), n))])
  first, second = np.swapaxes(np.eye(min(k, n))[pairs], 0, 1)  # [pairs, k] each, one-hot

  def paired(x):  # [heads, 2, tokens, k] to two [heads, tokens, pairs]: exact, for all but one of the products are 0
    x = x.astype(scores.dtype)
    return (arithmetic.product(x[:, i], one.T, scores.dtype) for i, one in enumerate((first, second)))

  sums = sum(paired(best))
  high, low = paired(index)
  rows = high.astype(jnp.int32) * n + low.astype(jnp.int32)
  return lax.sort((-sums, rows), num_keys=2)[1][..., :k]


@jax.custom_vjp
def _picked(scores: jax.Array, chosen: jax.Array) -> jax.Array:
  """scores [..., n] at chosen [..., k]."""
  return jnp.take_along_axis(scores, chosen, -1)


def _picked_backward(residuals, cotangent):
  like, chosen = residuals
  n = like.shape[-1]

  def scattered(chosen, cotangent):
    k = chosen.shape[-1]
    flat, of = chosen.reshape(-1, k), jnp.arange(chosen.size // k)[:, None]
    zeros = jnp.zeros((len(flat), n), cotangent.dtype)
    return zeros.at[of, flat].add(cotangent.reshape(-1, k)).reshape(*chosen.shape[:-1], n)

  def compared(chosen, cotangent):  # a TPU scatters one number at a time, and compares a thousand
    return jnp.sum(jnp.where(chosen[..., None] == jnp.arange(n), cotangent[..., None], 0), -2)

  return lax.platform_dependent(chosen, cotangent, tpu=compared, default=scattered), None


_picked.defvjp(
  lambda scores, chosen: (_picked(scores, chosen), (jnp.empty((0, scores.shape[-1]), scores.dtype), chosen)),
  _picked_backward,
)


class Read(NamedTuple):
  """What a layer reads: weights float32 and rows int32, both [batch, length, heads, top_k]."""

  weights: jax.Array
  rows: jax.Array


class ValueTable(nnx.Module):
  """The values, [n * n, value_dim] float32, split by value_dim over devices."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shape = config.product_keys.codebook**2, value_dim(config)
    self.values = parameter(jax.nn.initializers.normal(shape[1] ** -0.5), shape, (None, "value"), rngs)


@layer.register("product_keys")
class ProductKeys(layer.FeedForward):
  """Reads heads * top_k of the table's values for each token, token by token.

  y is the sum of the values that the heads read. Memory+ returns W2 (y * SiLU(W1 x)); without `plus` it is y itself, or
  a projection of it where a value is not as wide as x.
  """

  has_values = True

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    options, width, dtype = config.product_keys, value_dim(config), config.dtype
    embed, inner = {"embed": config.d_model}, {"mlp": width}
    heads, key = options.heads, key_dim(config)
    self.options, self.dtype = options, dtype
    queries = {"heads": heads, "head_dim": key}
    xavier = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=0, out_axis=(1, 2))
    self.query = Linear(embed, queries, dtype=dtype, bias=True, initializer=xavier, rngs=rngs)
    self.codebooks = parameter(
      lambda key_, shape, dtype: jax.random.uniform(key_, shape, dtype, -(key**-0.5), key**-0.5),
      (heads, 2, options.codebook, key // 2),
      ("heads", None, None, None),
      rngs,
    )
    if options.qk_norm:
      self.query_norm = RMSNorm({"half": key // 2}, rngs=rngs)
      self.key_norm = RMSNorm({"half": key // 2}, rngs=rngs)
    if options.plus:
      self.up = Linear(embed, inner, dtype=dtype, bias=True, rngs=rngs)
    if options.plus or width != config.d_model:
      scale = math.sqrt(width / config.d_model)  # W2 starts at normal(0, d_model^-0.5), whatever its inputs are
      self.down = Linear(inner, embed, dtype=dtype, scale=scale, bias=options.plus, rngs=rngs)
    if options.gate:
      self.output_gate = Linear(embed, {"out": config.d_model}, dtype=dtype, rngs=rngs)
    if not options.shared:
      self.table = ValueTable(config, rngs=rngs)

  def __call__(self, x: jax.Array, context: Context = PLAIN) -> jax.Array:
    """x [batch, length, d_model] to the same shape, in the computation's dtype."""
    weights, rows = self.look_up(x)
    table = self.table if hasattr(self, "table") else context.shared[self.name]
    y = values.read(read, table.values[...], rows, weights).astype(self.dtype)
    y = checkpoint_name(y, layer.KEPT)
    if hasattr(self, "up"):
      y = y * jax.nn.silu(self.up(x))
    if hasattr(self, "down"):
      y = self.down(axes.constrain(y, (*axes.TOKENS, "mlp")))
    if hasattr(self, "output_gate"):
      y = y * jax.nn.sigmoid(self.output_gate(x))
    return y

  def count(self, x: jax.Array, context: Context) -> jax.Array:
    """See `FeedForward.count`."""
    weights, rows = self.look_up(x)
    if context.document is not None:
      weights = weights * (context.document > 0)[..., None, None]
    return jnp.zeros(self.options.codebook**2, weights.dtype).at[rows.reshape(-1)].add(weights.reshape(-1))

  def look_up(self, x: jax.Array) -> Read:
    """What the tokens x [batch, length, d_model] read."""
    queries, codebooks = self.query(x), self.codebooks[...].astype(self.dtype)
    if self.options.qk_norm:
      halves = queries.reshape(*queries.shape[:-1], 2, -1)
      queries = self.query_norm(halves).reshape(queries.shape)
      codebooks = self.key_norm(codebooks)
    find = functools.partial(lookup, top_k=self.options.top_k)
    return Read(*values.look_up(find, queries, codebooks))

  @classmethod
  def shared(cls, config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module | None:
    """The table of values, if the layers have one together."""
    return ValueTable(config, rngs=rngs) if config.product_keys.shared else None

  @classmethod
  def problems(cls, config: ModelConfig, prefix: str) -> list[str]:
    """A key_dim that follows from an odd d_model is odd."""
    if config.product_keys.key_dim is None and key_dim(config) % 2:
      return [f"{prefix}.product_keys.key_dim must be given, and even, where {prefix}.d_model={config.d_model} is odd"]
    return []

  @classmethod
  def mesh_problems(cls, config: ModelConfig, length: int, sizes: dict[str, int]) -> list[str]:
    """Values are split."""
    width = value_dim(config)
    what = f"model.product_keys.value_dim={config.product_keys.value_dim}"
    what += "" if config.product_keys.value_dim else f" (a width of {width})"
    return problems.indivisible(width, what, sizes, *axes.RULES["value"])

  @classmethod
  def work(cls, config: ModelConfig, length: int, context: int) -> Work:
    """Queries, both codebooks and the projections; and what is read."""
    options, width, d_model = config.product_keys, value_dim(config), config.d_model
    queries = options.heads * key_dim(config)
    projections = 2 * options.plus * d_model * width or (width != d_model) * d_model * width
    parameters = queries * (d_model + options.codebook) + projections + options.gate * d_model**2
    return Work(parameters=parameters, flops=2 * options.heads * options.top_k * width)


def key_dim(config: ModelConfig) -> int:
  """Width of a query."""
  given = config.product_keys.key_dim
  return min(config.d_model, 512) if given is None else given


def value_dim(config: ModelConfig) -> int:
  """Width of a value."""
  given = config.product_keys.value_dim
  return config.d_model if given is None else given
