"""The memories' networks: M(x), each written once, with its linear reads handed in.

A network is `network(x, linear)`, where `linear(name, x)` reads x through the weights called `name`. Handing in another
`linear` gives every reader of the method (a state, the online chunk, a soup, the recording of inner gradients) without
touching the network. Weights are stored [in, out] and read as x @ W.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

# The mean square of gelu(x), x ~ N(0, 1).
_GELU_SQUARE = 0.425

Linear = Callable[[str, jax.Array], jax.Array]
Weights = dict[str, jax.Array]


class Network(Protocol):
  """What a memory's network offers; hashable, because rules are static arguments under jit.

  Attributes:
    least_features: the mean square of the last layer's inputs below which normalized steps (rules/gradient.py) do not
      grow any more; 0 where these are the keys.
  """

  least_features: float

  def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
    """M(x): x [..., head_dim] to [..., value_dim]; calls linear(name, ...) once for every name."""

  def init(self, key: jax.Array, heads: int, head_dim: int, value_dim: int | None = None) -> Weights:
    """M_0: {name: [heads, in, out]} float32.

    Args:
      key: a random key.
      heads: The number of memories.
      head_dim: The width of queries and keys.
      value_dim: The width of values and answers; None: head_dim.

    Raises:
      ValueError: the network cannot answer with this width (see `require_equal_widths`).
    """


@dataclasses.dataclass(frozen=True)
class Matrix:
  """A linear memory, M(x) = x W (arXiv:2602.24281, Eq. 2). M_0 = 0."""

  least_features = 0.0

  def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
    return linear("w", x)

  def init(self, key: jax.Array, heads: int, head_dim: int, value_dim: int | None = None) -> Weights:
    del key  # zeros
    return {"w": jnp.zeros((heads, head_dim, head_dim if value_dim is None else value_dim), jnp.float32)}


@dataclasses.dataclass(frozen=True)
class MLP:
  """A deep memory, M(x) = x + gelu(x W_1) W_2 (arXiv:2602.24281, appendix B), of any depth.

  `norm` puts a parameter-free layer norm on the branch: x + LN(...). M_0 is never zero: a zero MLP has zero gradients
  for ever.

  M_0 is drawn from N(0, 1 / in), for inputs of unit variance. With `unit_keys` it is at the scale of keys of unit
  LENGTH: W_1 ~ N(0, 1), without which the hidden layer is a linear map in disguise, layers between the first and the
  last ~ N(0, 1 / (0.425 in)), which keep unit variance through gelu, and the last layer ~ N(0, 1 / (in out)), which
  answers with a length of about 1, as the keys have.
  """

  depth: int = 2
  expansion: int = 4
  norm: bool = False
  unit_keys: bool = False

  def __post_init__(self):
    for field in ("depth", "expansion"):
      if getattr(self, field) < 1:
        raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")

  @property
  def least_features(self) -> float:
    """Far below gelu's mean square over normal numbers: hidden units have died."""
    return 0.03 if self.depth > 1 else 0.0

  def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
    h = x
    for layer in range(1, self.depth):
      h = gelu(linear(f"w{layer}", h))
    h = linear(f"w{self.depth}", h)
    return x + (layer_norm(h) if self.norm else h)

  def init(self, key: jax.Array, heads: int, head_dim: int, value_dim: int | None = None) -> Weights:
    require_equal_widths(head_dim, value_dim)
    widths = [head_dim] + [self.expansion * head_dim] * (self.depth - 1) + [head_dim]

    def scale(layer, d_in):
      if not self.unit_keys or self.depth == 1:
        return d_in**-0.5
      if layer == 1:
        return 1.0
      return (d_in * (head_dim if layer == self.depth else _GELU_SQUARE)) ** -0.5

    return {
      f"w{layer}": jax.random.normal(k, (heads, d_in, d_out), jnp.float32) * scale(layer, d_in)
      for layer, (k, d_in, d_out) in enumerate(
        zip(jax.random.split(key, self.depth), widths[:-1], widths[1:], strict=True), start=1
      )
    }


def require_equal_widths(head_dim: int, value_dim: int | None) -> None:
  """Raises ValueError unless values are as wide as keys, as a network needs them that answers with x + ..."""
  if value_dim not in (None, head_dim):
    raise ValueError(
      f"value_dim must be head_dim = {head_dim}: an MLP answers with x + ..., and only a matrix memory with "
      f"another width than that of its keys; got {value_dim}"
    )


def value_dim(network: Network, weights: Weights, head_dim: int) -> int:
  """The width of the network's answers, and so of the values that it stores.

  Args:
    network: M.
    weights: {name: [..., in, out]}.
    head_dim: The width of its inputs.

  Raises:
    ValueError: a layer takes inputs of another width.
  """

  def linear(name, x):
    width, out = weights[name].shape[-2:]
    if x.shape[-1] != width:
      raise ValueError(f"init[{name!r}] must be [heads, in, out] with in = {x.shape[-1]}; got in = {width}")
    return jnp.zeros((*x.shape[:-1], out))

  return jax.eval_shape(lambda: network(jnp.zeros((1, head_dim)), linear)).shape[-1]


def last(network: Network, weights: Weights) -> str:
  """The name of the layer that the network reads last. weights {name: [..., in, out]}."""
  called = []

  def linear(name, x):
    called.append(name)
    return jnp.zeros((*x.shape[:-1], weights[name].shape[-1]))

  width = next(iter(weights.values())).shape[-2]
  jax.eval_shape(lambda: network(jnp.zeros((1, width)), linear))
  return called[-1]


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
  """x Phi(x), by the tanh approximation; its derivative is one array to keep, where jax.nn.gelu's are several."""
  return 0.5 * x * (1.0 + _tanh(x))


def _tanh(x):
  return jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x)))


@jax.custom_jvp
def _gelu_slope(x):
  t = _tanh(x)
  return 0.5 * (1.0 + t) + x * (1.0 - t * t) * (0.5 * math.sqrt(2.0 / math.pi)) * (1.0 + 3 * 0.044715 * (x * x))


gelu.defjvp(lambda p, t: (gelu(p[0]), _gelu_slope(p[0]) * t[0]))


def _gelu_curve(x):
  t = _tanh(x)
  c = math.sqrt(2.0 / math.pi)
  u1 = c * (1.0 + 3 * 0.044715 * (x * x))
  s = 1.0 - t * t
  return s * (u1 + x * (3 * 0.044715 * c) * x - x * t * u1 * u1)


_gelu_slope.defjvp(lambda p, t: (_gelu_slope(p[0]), _gelu_curve(p[0]) * t[0]))


def layer_norm(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """Layer norm over the last axis, without parameters."""
  x = x - x.mean(-1, keepdims=True)
  return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon)
