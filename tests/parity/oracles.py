"""Holding a rule against someone else's PyTorch function: outputs and gradients, on the same random inputs.

Ours is in float64, so that what differs is theirs: its definition or its precision.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mc_jax import memory

torch = pytest.importorskip("torch", reason="pip install torch")

# Two segments, three chunks of ours, the last one short; a different cut from any chunk of theirs.
BATCH, LENGTH, HEADS, HEAD_DIM = 2, 40, 2, 8
CHUNK, SEGMENTS = 16, memory.segments.constant(24)

Inputs = dict[str, Any]  # q, k, v [batch, length, heads, head_dim]; gates and init by name


def inputs(rule: memory.rules.Rule, *, heads: int = HEADS, fresh: bool = False, seed: int = 0) -> Inputs:
  """Random float64 inputs: keys of unit length, gates that matter, and M_0 random, or the rule's own with `fresh`."""
  rng = np.random.default_rng(seed)
  shape = BATCH, LENGTH, heads
  q, k, v = rng.normal(size=(3, *shape, HEAD_DIM))
  ranges = {"alpha": (0.5, 0.999), "beta": (0.3, 0.9)}
  gates = {
    name: rng.uniform(*ranges.get(name, (0.1, 0.9)), (*shape, HEAD_DIM) if gate.per_channel else shape)
    for name, gate in rule.gates.items()
  }
  init = rule.init(jax.random.key(0), heads=heads, head_dim=HEAD_DIM)
  init = {name: np.asarray(w, np.float64) if fresh else rng.uniform(0.5, 1, w.shape) for name, w in init.items()}
  return {"q": q, "k": k / np.linalg.norm(k, axis=-1, keepdims=True), "v": v, "gates": gates, "init": init}


def assert_equal(
  rule: memory.rules.Rule,
  oracle: "Callable[[dict], torch.Tensor]",
  x: Inputs,
  *,
  rtol: float,
  dtype: "torch.dtype" = torch.float32,
  unread: tuple[str, ...] = (),
) -> None:
  """Outputs, and gradients in every input, differ by at most rtol times the largest value of each; prints by how much.

  Args:
    rule: ours, read without caches.
    oracle: theirs. It is given the inputs as tensors, M_0 repeated for the batch, and returns outputs laid out as ours.
    x: the inputs.
    rtol: the tolerance.
    dtype: of the tensors.
    unread: inputs and gates that theirs does not take, and of which there is no gradient.
  """

  def ours(x):
    q, k, v, gates, init = x["q"], x["k"], x["v"], x["gates"], x["init"]
    return memory.memory_caching(q, k, v, q, gates, init, rule=rule, aggregation="none", segmentation=SEGMENTS)

  y, pull = jax.vjp(jax.jit(ours), jax.tree.map(jnp.asarray, x))
  cotangent = np.random.default_rng(1).normal(size=y.shape)
  (gradient,) = pull(jnp.asarray(cotangent))

  leaves, tree = jax.tree.flatten(x)
  paths = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(x)]
  tensors = [torch.tensor(leaf, dtype=dtype, requires_grad=True) for leaf in leaves]
  given = jax.tree.unflatten(tree, tensors)
  given["init"] = {name: w.expand(BATCH, *w.shape) for name, w in given["init"].items()}
  answer = oracle(given)
  theirs = torch.autograd.grad((answer * torch.tensor(cotangent, dtype=dtype)).sum(), tensors, allow_unused=True)

  assert [name for name, g in zip(paths, theirs, strict=True) if g is None] == sorted(unread)
  found = {"outputs": (y, answer)}
  found |= {name: (a, b) for name, a, b in zip(paths, jax.tree.leaves(gradient), theirs, strict=True) if b is not None}
  assert_close(rule.name, found, rtol=rtol)


def assert_close(title: str, found: "dict[str, tuple[jax.Array, torch.Tensor]]", *, rtol: float) -> None:
  """Ours and theirs of each name differ by at most rtol times theirs' largest value; prints by how much."""
  worst = {}
  for name, (ours, theirs) in found.items():
    a, b = np.asarray(ours), theirs.detach().numpy().astype(np.float64)
    assert a.shape == b.shape and np.abs(b).max() > 1e-2, name
    worst[name] = np.abs(a - b).max() / np.abs(b).max()
  print(title, {name: f"{w:.1e}" for name, w in worst.items()})
  assert max(worst.values()) <= rtol, worst
