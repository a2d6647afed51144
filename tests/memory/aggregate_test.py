"""Reading cached memories: against sums written out, what is never touched, what never exists."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples
from jax.extend import core
from marks import slow

from mc_jax.memory import aggregate, networks, rules, segments, selection

FLOAT64 = pytest.mark.usefixtures("float64")
NETWORKS = pytest.mark.parametrize(
  "network", [networks.Matrix(), networks.MLP(2, 2, norm=True)], ids=["matrix", "network"]
)
MEMORIES = 5


def memories(network, *, count=MEMORIES, batch=2, heads=3, head_dim=4, seed=0):
  """Random stacked states {name: [count, batch, heads, in, out]}."""
  shapes = jax.eval_shape(functools.partial(network.init, heads=heads, head_dim=head_dim), jax.random.key(0))
  rng = np.random.default_rng(seed)
  return {name: rng.normal(size=(count, batch, *w.shape)) for name, w in shapes.items()}


def reads(network, q, states):
  """Every memory's read of every query, [b, h, T, n, d], each memory a plain network."""

  def read(memory):
    return network(q, lambda name, x: x @ memory[name])

  return jnp.moveaxis(jax.vmap(read)(states), 0, -2)


def value_and_gradients(function, cotangent):
  """Compiled args to function's value and gradients along a cotangent, in numpy."""

  def run(*args):
    y, pull = jax.vjp(function, *args)
    return y, pull(cotangent)

  return samples.numpy(samples.jit(run))


@FLOAT64
@NETWORKS
@pytest.mark.parametrize("count", [0, 3])
def test_a_gated_read_is_the_gated_sum_of_reads(network, count):
  """Of the first `count` memories: the others may hold anything, and get no gradient. So may those whose gate is 0."""
  rng = np.random.default_rng(1)
  q, cotangent = rng.normal(size=(2, 2, 3, 6, 4))
  gates, states = rng.normal(size=(MEMORIES, 2, 3, 6)), memories(network)
  gates[1] = 0
  states = {name: w.copy() for name, w in states.items()}
  for w in states.values():
    w[count:] = np.nan
  used = np.isin(np.arange(MEMORIES), [i for i in range(count) if i != 1])

  def expected(q, gates, states):
    gates = jnp.where(used[:, None, None, None], gates, 0)
    states = {name: jnp.where(used[:, None, None, None, None], w, 0) for name, w in states.items()}
    return jnp.einsum("nbht,bhtnd->bhtd", gates, reads(network, q, states))

  def read(q, gates, states):
    return aggregate.sum_of_stacked_reads(aggregate.ReadNetwork(network), q, gates, states, count)

  actual = value_and_gradients(read, cotangent)(q, gates, states)
  expected = value_and_gradients(expected, cotangent)(q, gates, states)
  chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-9)

  for w in states.values():
    w[1] = np.inf  # a memory that overflowed, which no token listens to
  y, (_, gate_gradients, _) = value_and_gradients(read, cotangent)(q, gates, states)
  chex.assert_trees_all_close((y, gate_gradients), (expected[0], expected[1][1]), rtol=1e-9, atol=1e-9)


@FLOAT64
def test_a_layer_of_a_soup_is_read_through_its_mixed_weights():
  rng = np.random.default_rng(2)
  x, gates, w = rng.normal(size=(2, 3, 6, 4)), rng.normal(size=(5, 2, 3, 6)), rng.normal(size=(5, 2, 3, 4, 7))
  w[4] = np.nan
  cotangent = rng.normal(size=(2, 3, 6, 7))

  def soup(x, gates, w):
    mixed = jnp.einsum("nbht,nbhio->bhtio", gates[:4], w[:4])
    return jnp.einsum("bhti,bhtio->bhto", x, mixed)

  def read(x, gates, w):
    return aggregate.sum_of_stacked_reads(aggregate.ReadLayer("w1"), x, gates, {"w1": w}, 4)

  actual, expected = (value_and_gradients(f, cotangent)(x, gates, w) for f in (read, soup))
  chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-9)


def routed(seed=3, slots=2):
  """Queries, and the memories they go to; memory 2 is chosen by nobody, memory 4 by all tokens of one head."""
  rng = np.random.default_rng(seed)
  q, cotangent = rng.normal(size=(2, 2, 3, 7, 4))
  index = rng.choice([0, 1, 3], size=(2, 3, 7, slots))
  index[1, 2] = 4
  gates = rng.uniform(0.1, 1, size=index.shape)
  gates[rng.random(gates.shape) < 0.3] = 0
  return q, index, gates, cotangent


@FLOAT64
@NETWORKS
@pytest.mark.parametrize("block", [None, 1, 4, 64])
def test_a_selective_read_is_the_sum_over_what_was_selected(network, block):
  """Whatever the blocks are (None: the size that XLA's path has), and whatever their padding reads."""
  q, index, gates, cotangent = routed()
  states = memories(network)

  def expected(q, gates, states):
    y = jnp.take_along_axis(reads(network, q, states), index[..., None], axis=-2)
    return jnp.where(gates[..., None] == 0, 0, gates[..., None] * y).sum(-2)  # gate 0: an empty slot

  def read_blocks(x, gates, owner, states):
    empty = owner == MEMORIES  # whose y nobody looks at
    states = {name: jnp.moveaxis(w, 0, 2) for name, w in states.items()}
    own = {
      name: jnp.take_along_axis(w, jnp.minimum(owner, MEMORIES - 1)[..., None, None], 2) for name, w in states.items()
    }
    assert x.shape[-2] == block
    gates = gates[..., None]
    y = jnp.where(empty[..., None, None], jnp.nan, network(x, lambda name, z: z @ own[name]))
    return gates * jnp.where(gates == 0, 0.0, y)

  def read(q, gates, states):
    if block is None:
      return selection.read_selected(network, q, index, gates, states)
    return selection.select_and_read(read_blocks, block, q, index, gates, states)

  actual, expected = (value_and_gradients(f, cotangent)(q, gates, states) for f in (read, expected))
  chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_blocks_are_one_memorys_each_in_ascending_order():
  """And every token's query is in a block of each memory that it chose, empty slots in blocks of none."""
  q, index, gates, _ = routed()
  block, seen = 4, []

  def read_blocks(x, gates, owner, states):
    seen.extend((x, owner))
    return x

  selection.select_and_read(read_blocks, block, q, index, gates, memories(networks.Matrix()))
  x, owner = map(np.asarray, seen)
  assert owner.shape[-1] <= -(-index[0, 0].size // block) + MEMORIES + 1
  assert (np.diff(owner) >= 0).all()
  chosen = np.where(gates == 0, MEMORIES, index)
  for b, h in np.ndindex(owner.shape[:2]):
    blocks = [max(1, -(-(chosen[b, h] == i).sum() // block)) for i in range(MEMORIES)]  # no more than are needed
    assert [(owner[b, h] == i).sum() for i in range(MEMORIES)] == blocks
  for b, h, t, slot in np.argwhere(gates != 0):
    own = x[b, h, owner[b, h] == index[b, h, t, slot]]
    assert (own == np.float32(q[b, h, t])).all(-1).any()


def intermediates(jaxpr: core.Jaxpr):
  """The shapes of all values in a program and in the programs it calls; what is inside a kernel is not in memory."""
  for equation in jaxpr.eqns:
    yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
    if equation.primitive.name == "pallas_call":
      continue
    for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr))):
      if isinstance(inner, core.ClosedJaxpr):
        yield from intermediates(inner.jaxpr)
      elif isinstance(inner, core.Jaxpr):
        yield from intermediates(inner)


@pytest.mark.parametrize(
  ("aggregation", "implementation"),
  [
    ("residual", "xla"),
    slow("grm", "xla"),
    ("soup", "xla"),
    slow("ssc", "xla"),
    slow("residual", "pallas"),
    ("grm", "pallas"),
    slow("soup", "pallas"),
    ("ssc", "pallas"),
  ],
)
def test_no_array_holds_every_memorys_read_of_every_token(aggregation, implementation):
  """Nothing of memories x tokens x head_dim numbers, forward or backward, in a whole layer."""
  rule = rules.get("titans", chunk=16, expansion=2)
  length, segment, head_dim = 512, 32, 8
  caches = length // segment - 1
  x = samples.inputs(rule, batch=1, length=length, heads=1, head_dim=head_dim)

  x = jax.tree.map(np.float32, x)
  options = dict(rule=rule, segmentation=segments.constant(segment), implementation=implementation)

  def loss(x):
    return samples.call(x, aggregation=aggregation, **options).sum()

  sizes = [np.prod(shape) for shape in intermediates(jax.make_jaxpr(jax.grad(loss))(x).jaxpr)]
  assert len(sizes) > (500 if implementation == "xla" else 100)  # inner programs are walked too
  assert max(sizes) < caches * length * head_dim

  def dense(x):  # what the test is there to find
    gates, states = jnp.ones((1, 1, length, caches)), memories(rule.network, count=caches, batch=1, heads=1, head_dim=8)
    return jnp.einsum("bhtn,bhtnd->bhtd", gates, reads(rule.network, jnp.moveaxis(x.q, 2, 1), states))

  assert max(np.prod(s) for s in intermediates(jax.make_jaxpr(dense)(x).jaxpr)) >= caches * length * head_dim
