"""Random inputs of `memory_caching`, a row of documents, and compiled values and gradients, for the tests beside it.

What two tests of a file need alike is compiled once.
"""

import functools
import itertools
import pathlib
import sys
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest

from mc_jax import memory

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # programs in this folder import this file, too
from quick_compile import jit

# Of one file; the others are those of recurrences_test.py.
GRADIENT_RULES = ("linear", "swla", "dla", "titans")

# Every aggregation but residual, both carries, with matrices and with networks. The others are the same code put
# together in other ways, and each takes seconds to compile.
QUICK = {
  ("linear", "none", "checkpoint"),
  ("linear", "soup", "checkpoint"),
  ("swla", "ssc", "independent"),
  ("titans", "grm", "checkpoint"),
}
COMBINATIONS = [
  pytest.param(*names, id="-".join(names), marks=[] if names in QUICK else [pytest.mark.slow])
  for names in itertools.product(GRADIENT_RULES, memory.AGGREGATIONS, memory.CARRIES)
]


def numpy(function):
  """function with numpy results: slicing, comparing and adding jax arrays compiles, too."""
  return lambda *args: jax.device_get(function(*args))


# Four rows of documents on a grid of segments of 6 and chunks of 3: segments end at 5, 11, 17, 23 and 25.
LENGTH, SEGMENT, CHUNK = 26, 6, 3
SEGMENT_IDS = np.array(
  [
    # Several starts in the chunk of tokens 3 to 5, one of them a single token; padding in the middle; an id used again;
    # starts at the last token of a segment (11), in the middle of the last chunk of one (23).
    [1] * 4 + [2] + [3] * 4 + [0] * 2 + [1] * 12 + [4] * 3,
    # Padding at both ends and at a segment's end; a document that starts on a segment boundary (12).
    [0] * 2 + [5] * 8 + [0] * 2 + [6] * 12 + [0] * 2,
    # A long document, which sees up to four caches.
    [7] + [8] * 25,
    [0] * 26,
  ]
)


class Inputs(NamedTuple):
  """memory_caching's arrays: [batch, length, heads, ...], gates and init by name."""

  q: chex.Array
  k: chex.Array
  v: chex.Array
  u: chex.Array
  gates: dict[str, chex.Array]
  init: dict[str, chex.Array]
  token_scores: chex.Array | None = None

  def tokens(self, segment_ids=None) -> memory.Tokens:
    """All but init, as one record."""
    documents = None if segment_ids is None else memory.documents.index(segment_ids)
    return memory.Tokens(self.q, self.k, self.v, self.u, self.gates, documents, self.token_scores)


def inputs(rule, *, batch=4, length=LENGTH, heads=2, head_dim=4, value_dim=None, ages=None, seed=0) -> Inputs:
  """Random inputs, float64 numpy: normalised keys, M_0 never zero, gates that matter."""
  rng = np.random.default_rng(seed)
  q, k, v, u = rng.normal(size=(4, batch, length, heads, head_dim))
  if value_dim is not None:
    v = rng.normal(size=(batch, length, heads, value_dim))
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  low, high = {"alpha": (0.6, 1.0), "beta": (0.3, 0.9)}, (0.02, 0.2)
  shape = batch, length, heads
  gates = {
    name: rng.uniform(*low.get(name, high), (*shape, head_dim) if gate.per_channel else shape)
    for name, gate in rule.gates.items()
  }
  init = functools.partial(rule.init, heads=heads, head_dim=head_dim, value_dim=value_dim)
  shapes = jax.eval_shape(init, jax.random.key(0))
  init = {name: rng.normal(size=w.shape) * 0.6 for name, w in shapes.items()}
  if "floor" in init:  # of mlstm, e^-m
    init["floor"] = np.abs(init["floor"])
  scores = None if ages is None else rng.normal(size=(batch, length, heads, ages))
  return Inputs(q, k, v, u, gates, init, scores)


def map_tokens(function, x: Inputs, *others: Inputs) -> Inputs:
  """Inputs with function applied to the arrays [batch, length, heads, ...]: all but init."""
  mapped = jax.tree.map(function, *(each._replace(init={}) for each in (x, *others)))
  return mapped._replace(init=x.init)


def tokens(x: Inputs) -> dict[str, jax.Array]:
  """The arrays [batch, length, heads, ...] by name: all but init."""
  return {jax.tree_util.keystr(path): w for path, w in jax.tree.leaves_with_path(x._replace(init={}))}


def select(where, x: Inputs, other) -> Inputs:
  """x where `where` (broadcast to [batch, length]), elsewhere other: Inputs or a number."""

  def pick(x, other):
    mask = np.broadcast_to(where, x.shape[:2])
    return np.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, other)

  return map_tokens(pick, x, other) if isinstance(other, Inputs) else map_tokens(lambda w: pick(w, other), x)


def document_numbers(segment_ids) -> np.ndarray:
  """1, 2, ... in each row, 0 at padding: a document is a run of one nonzero id."""
  numbers = np.zeros_like(segment_ids)
  for row, ids in enumerate(segment_ids):
    number = 0
    for t, i in enumerate(ids):
      number += i != 0 and (t == 0 or i != ids[t - 1])
      numbers[row, t] = number if i != 0 else 0
  return numbers


def like(tree, seed=1):
  """Standard normal numbers in the shapes of a tree."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), tree)


def call(x: Inputs, segment_ids=None, **options) -> jax.Array:
  """memory_caching(*x, **options)."""
  return memory.memory_caching(*x[:6], token_scores=x.token_scores, segment_ids=segment_ids, **options)


@functools.cache
def forward(**options):
  """Compiled (inputs, segment_ids) to y, in numpy."""
  return numpy(jit(functools.partial(call, **options)))


@functools.cache
def forward_and_back(**options):
  """Compiled (inputs, segment_ids, cotangent) to y and the gradients of <y, cotangent>, Inputs as well."""

  def run(x, segment_ids, cotangent):
    y, pull = jax.vjp(lambda x: call(x, segment_ids, **options), x)
    return y, pull(cotangent)[0]

  return numpy(jit(run))


def derivatives(function, x: Inputs, directions: Inputs, step=1e-5) -> dict[str, float]:
  """d/dx_i function(x) . direction_i of every array x_i, by central differences of fourth order; function is scalar."""
  paths, treedef = jax.tree.flatten_with_path(x)
  directions = treedef.flatten_up_to(directions)
  out = {}
  for i, (path, leaf) in enumerate(paths):

    def moved(distance, i=i, leaf=leaf):
      leaves = [w for _, w in paths]
      leaves[i] = leaf + distance * step * directions[i]
      return function(treedef.unflatten(leaves))

    out[jax.tree_util.keystr(path)] = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step)
  return out


def along(gradient: Inputs, directions: Inputs) -> dict[str, float]:
  """What `derivatives` should be, by a gradient."""
  paths, treedef = jax.tree.flatten_with_path(gradient)
  directions = treedef.flatten_up_to(directions)
  return {jax.tree_util.keystr(p): np.vdot(g, d) for (p, g), d in zip(paths, directions, strict=True)}


def assert_equals_reference(x: Inputs, segment_ids=None, seed=2, **options) -> None:
  """The fast path's output is the reference's to 1e-9, its gradients along a random direction of each array to 1e-6."""
  reference = forward(implementation="reference", **options)
  cotangent, directions = like(x.v, seed), like(x, seed + 1)
  y, gradient = forward_and_back(**options)(x, segment_ids, cotangent)
  chex.assert_trees_all_close(y, reference(x, segment_ids), rtol=1e-9, atol=1e-9)
  expected = derivatives(lambda x: np.vdot(reference(x, segment_ids), cotangent), x, directions)
  chex.assert_trees_all_close(along(gradient, directions), expected, rtol=1e-6, atol=1e-6)
