"""Reading cached memories: against sums written out, what is never touched, what never exists, and for TPUs."""

import functools
import importlib.util
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples
from jax.extend import core

from mc_jax.memory import aggregate, networks, rules, segments

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
  gates, states = rng.normal(size=(2, 3, 6, MEMORIES)), memories(network)
  gates[..., 1] = 0
  states = {name: w.copy() for name, w in states.items()}
  for w in states.values():
    w[count:] = np.nan
  used = np.isin(np.arange(MEMORIES), [i for i in range(count) if i != 1])

  def expected(q, gates, states):
    gates = jnp.where(used, gates, 0)
    states = {name: jnp.where(used[:, None, None, None, None], w, 0) for name, w in states.items()}
    return jnp.einsum("bhtn,bhtnd->bhtd", gates, reads(network, q, states))

  actual = value_and_gradients(lambda *args: aggregate.read_gated(network, *args, count), cotangent)(q, gates, states)
  expected = value_and_gradients(expected, cotangent)(q, gates, states)
  chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-9)

  for w in states.values():
    w[1] = np.inf  # a memory that overflowed, which no token listens to
  y, (_, gate_gradients, _) = value_and_gradients(lambda *args: aggregate.read_gated(network, *args, count), cotangent)(
    q, gates, states
  )
  chex.assert_trees_all_close((y, gate_gradients), (expected[0], expected[1][1]), rtol=1e-9, atol=1e-9)


@FLOAT64
def test_a_layer_of_a_soup_is_read_through_its_mixed_weights():
  rng = np.random.default_rng(2)
  x, gates, w = rng.normal(size=(2, 3, 6, 4)), rng.normal(size=(2, 3, 6, 5)), rng.normal(size=(5, 2, 3, 4, 7))
  w[4] = np.nan
  cotangent = rng.normal(size=(2, 3, 6, 7))

  def soup(x, gates, w):
    mixed = jnp.einsum("bhtn,nbhio->bhtio", gates[..., :4], w[:4])
    return jnp.einsum("bhti,bhtio->bhto", x, mixed)

  def read(x, gates, w):
    return aggregate.read_layer(x, gates, w, 4, x.dtype)

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
@pytest.mark.parametrize("block", [1, 4, 64])
def test_a_selective_read_is_the_sum_over_what_was_selected(network, block):
  q, index, gates, cotangent = routed()
  states = memories(network)

  def expected(q, gates, states):
    y = jnp.take_along_axis(reads(network, q, states), index[..., None], axis=-2)
    return jnp.where(gates[..., None] == 0, 0, gates[..., None] * y).sum(-2)  # gate 0: an empty slot

  def read(q, gates, states):
    return aggregate.read_selected(network, q, index, gates, states, block=block)

  actual, expected = (value_and_gradients(f, cotangent)(q, gates, states) for f in (read, expected))
  chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-9)


@FLOAT64
@NETWORKS
def test_the_grouped_product_of_tpus_is_that_of_other_platforms(network):
  rng = np.random.default_rng(4)
  rows, cotangent = rng.normal(size=(2, 2, 3, 9, 4))
  chosen = np.sort(rng.choice([0, 1, 3], size=(2, 3, 9)))
  chosen[1, 2] = 4
  states = {name: np.moveaxis(w, 0, 2) for name, w in memories(network).items()}

  def ragged(rows, states):
    return aggregate._grouped_ragged(network, rows, chosen, states)

  on_tpu = value_and_gradients(ragged, cotangent)(rows, states)
  for block in (1, 2, 32):

    def blocks(rows, states, block=block):
      return aggregate._grouped_blocks(network, block, rows, chosen, states)

    elsewhere = value_and_gradients(blocks, cotangent)(rows, states)
    chex.assert_trees_all_close(on_tpu, elsewhere, rtol=1e-9, atol=1e-9)


def intermediates(jaxpr: core.Jaxpr):
  """The shapes of all values in a program and in the programs it calls."""
  for equation in jaxpr.eqns:
    yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
    for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr))):
      if isinstance(inner, core.ClosedJaxpr):
        yield from intermediates(inner.jaxpr)
      elif isinstance(inner, core.Jaxpr):
        yield from intermediates(inner)


@pytest.mark.parametrize("aggregation", ["residual", "grm", "soup", "ssc"])
def test_no_array_holds_every_memorys_read_of_every_token(aggregation):
  """Nothing of memories x tokens x head_dim numbers, forward or backward, in a whole layer."""
  rule = rules.get("titans", chunk=16, expansion=2)
  length, segment, head_dim = 512, 32, 8
  caches = length // segment - 1
  x = samples.inputs(rule, batch=1, length=length, heads=1, head_dim=head_dim)

  def loss(x):
    return samples.call(x, rule=rule, aggregation=aggregation, segmentation=segments.constant(segment)).sum()

  sizes = [np.prod(shape) for shape in intermediates(jax.make_jaxpr(jax.grad(loss))(x).jaxpr)]
  assert len(sizes) > 500  # inner programs are walked too
  assert max(sizes) < caches * length * head_dim

  def dense(x):  # what the test is there to find
    gates, states = jnp.ones((1, 1, length, caches)), memories(rule.network, count=caches, batch=1, heads=1, head_dim=8)
    return jnp.einsum("bhtn,bhtnd->bhtd", gates, reads(rule.network, jnp.moveaxis(x.q, 2, 1), states))

  assert max(np.prod(s) for s in intermediates(jax.make_jaxpr(dense)(x).jaxpr)) >= caches * length * head_dim


COMPILE_FOR_TPU = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from mc_jax.memory import aggregate, networks

network = networks.MLP(2, 2)
device = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
place = jax.sharding.SingleDeviceSharding(device)
def array(shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
states = {"w1": array((4, 1, 2, 128, 256)), "w2": array((4, 1, 2, 256, 128))}
q, index, gates = array((1, 2, 64, 128), jnp.bfloat16), array((1, 2, 64, 2), jnp.int32), array((1, 2, 64, 2))
def read(q, index, gates, states):
  return aggregate.read_selected(network, q, index, gates, states).sum()
for step in (read, jax.grad(read, (0, 2, 3))):
  lowered = jax.jit(step).lower(q, index, gates, states)
  lowered.compile()
  print(lowered.as_text().count("chlo.ragged_dot"))
"""

# The TPU's compiler comes with libtpu, which exists for Linux on x86_64 only.
if importlib.util.find_spec("libtpu"):

  def test_selective_reads_compile_for_tpus_by_ragged_products():
    """In a process of its own: libtpu wants to be told before jax starts that there is no TPU to ask."""
    environment = dict(
      JAX_PLATFORMS="cpu",
      TPU_SKIP_MDS_QUERY="1",
      TPU_ACCELERATOR_TYPE="v5litepod-4",
      TPU_WORKER_HOSTNAMES="localhost",
      ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    run = subprocess.run(
      [sys.executable, "-c", COMPILE_FOR_TPU], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    forward, backward = map(int, run.stdout.split())
    assert backward > forward > 0
