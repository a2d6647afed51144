"""Parameters with named axes, and the linear map that every projection here is."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax.parallel import axes as axes_lib


def parameter(initializer, shape, axes, rngs: nnx.Rngs) -> nnx.Param:
  """A float32 parameter whose axes carry logical names.

  The names ("embed", "heads", "mlp", ...) are metadata: `nnx.get_partition_spec` under
  `nnx.logical_axis_rules` maps them to a mesh. No mesh need exist when the parameter is made.

  Args:
    initializer: from `jax.nn.initializers`.
    shape: of the parameter.
    axes: a name, or None, per axis.
    rngs: its `params` stream is drawn from.
  """
  value = initializer(rngs.params(), shape, jnp.float32)
  return nnx.Param(value, out_sharding=tuple(axes), eager_sharding=False)


def fan_in(inputs: int, outputs: int, scale: float = 1.0):
  """Truncated normal that maps unit variance to variance `scale**2`.

  Args:
    inputs: leading axes of the parameter that are summed over.
    outputs: the axes that follow.
    scale: standard deviation of an output whose inputs have unit variance.
  """
  return jax.nn.initializers.variance_scaling(
    scale**2,
    "fan_in",
    "truncated_normal",
    in_axis=tuple(range(inputs)),
    out_axis=tuple(range(inputs, inputs + outputs)),
  )


class Linear(nnx.Module):
  """y = x W, or x W + b: x [..., *inputs] to y [..., *outputs] in the computation's dtype.

  `inputs` and `outputs` give each axis a logical name and a size, in order. `bias`: whether there is a b, which starts
  at 0. `initializer` of the kernel: None is `fan_in` at `scale`.
  """

  def __init__(
    self,
    inputs: dict[str, int],
    outputs: dict[str, int],
    *,
    rngs: nnx.Rngs,
    dtype: jnp.dtype = jnp.float32,
    scale: float = 1.0,
    bias: bool = False,
    initializer: jax.nn.initializers.Initializer | None = None,
  ):
    self.contracted = len(inputs)
    self.axes = (*inputs, *outputs)
    self.dtype = dtype
    self.kernel = parameter(
      initializer or fan_in(len(inputs), len(outputs), scale),
      (*inputs.values(), *outputs.values()),
      self.axes,
      rngs,
    )
    if bias:
      self.bias = parameter(jax.nn.initializers.zeros, tuple(outputs.values()), outputs, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = axes_lib.gathered(self.kernel[...].astype(self.dtype), self.axes)
    y = jnp.tensordot(x.astype(self.dtype), kernel, axes=self.contracted)
    return y + self.bias[...].astype(y.dtype) if hasattr(self, "bias") else y


class LowRank(nnx.Module):
  """y = (x D) U + b: `Linear` through a layer of `rank` channels. `bias`: whether there is a b, which starts at 0."""

  def __init__(
    self,
    inputs: dict[str, int],
    rank: int,
    outputs: dict[str, int],
    *,
    rngs: nnx.Rngs,
    bias: bool = False,
    dtype: jnp.dtype = jnp.float32,
    scale: float = 1.0,
  ):
    self.down = Linear(inputs, {"rank": rank}, dtype=dtype, rngs=rngs)
    self.up = Linear({"rank": rank}, outputs, dtype=dtype, scale=scale, rngs=rngs)
    if bias:
      self.bias = parameter(jax.nn.initializers.zeros, tuple(outputs.values()), outputs, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.up(self.down(x))
    return y + self.bias[...].astype(y.dtype) if hasattr(self, "bias") else y


def residual_scale(layers: int) -> float:
  """Scale of a branch's last projection: 2 branches a layer then add up to unit variance."""
  return 1.0 / math.sqrt(2 * layers)
