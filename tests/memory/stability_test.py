"""Memories neither die nor blow up over a long stream, at the gates' starting values and at their worst.

The long runs (200 training steps at length 4,096) are docs/stability.md's.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from quick_compile import jit

from mc_jax.memory import documents, rules, segments, xla
from mc_jax.memory.arithmetic import solve
from mc_jax.memory.tokens import Tokens

LENGTH, SEGMENT, WIDTH = 32_768, 256, 16
DEEP = {
  "titans": {},
  "titans, depth 4": {"depth": 4},
  "titans, norm": {"norm": True},
  "dla": {},
}
KINDS = [name if name == "titans" else slow(name) for name in DEEP]


def deep(name, **options):
  """The rule of a name in DEEP."""
  return rules.get(name.partition(",")[0], **DEEP[name], **options)


def stream(seed):
  """Unit keys, and values that are a noisy linear map of them; the map is another every 2,048 tokens."""
  keys, maps, noise = jax.random.split(jax.random.key(seed), 3)
  k = jax.random.normal(keys, (LENGTH, WIDTH))
  k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
  tasks = jax.random.normal(maps, (LENGTH // 2048, WIDTH, WIDTH))
  v = jnp.einsum("nld,nde->nle", k.reshape(-1, 2048, WIDTH), tasks).reshape(LENGTH, WIDTH)
  return k, v + 0.2 * jax.random.normal(noise, v.shape)


def write(rule, k, v, gates):
  """Writes one long sequence [LENGTH, WIDTH]; returns reads of its own keys, and norms of M and S by segment."""
  init = rule.init(jax.random.key(1), heads=1, head_dim=WIDTH)
  k, v = k[None, None], v[None, None]
  gates = {name: jnp.full(k.shape[:-1], value) for name, value in gates.items()}
  tokens = Tokens(k, k, v, k, gates)

  def read(memory, x):
    return rule.network(x, lambda name, z: memory.read(name, z, x.dtype))

  @jax.jit
  def run(tokens):
    lengths = segments.constant(SEGMENT).lengths(LENGTH)
    written = xla.write(rule, init, tokens, lengths, read=read, carries=True, side_by_side=1)
    return written.y[0, 0], norms(written.states.memory), norms(written.states.momentum)

  return jax.tree.map(np.asarray, run(tokens))


def norms(states):
  """Frobenius norms over all layers, by segment, of leaves [segments, 1, 1, in, out]; 0 of None."""
  return jnp.sqrt(sum((jnp.square(w).sum((1, 2, 3, 4)) for w in jax.tree.leaves(states)), jnp.zeros(())))


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_memory_stays_alive_and_bounded_over_a_long_stream(name, normalized):
  k, v = stream(0)
  rule = deep(name, normalized=normalized)
  y, memory, _ = write(rule, k, v, rule.starting_gates(SEGMENT))
  init = rule.init(jax.random.key(1), heads=1, head_dim=WIDTH)
  start = float(norms(jax.tree.map(lambda w: w[None, None], init))[0])
  chex.assert_tree_all_finite((y, memory))
  assert memory.max() < 4 * start
  assert memory.min() > 0.25 * start
  if name != "dla":  # whose loss is not an error
    error = np.square(y - v).sum(-1) / np.square(v).sum(-1).mean()
    most = 0.25 if normalized else 0.6
    assert error[-512:].mean() < most, "the last task is not learned: the memory is dead or forgets at once"


@pytest.mark.parametrize("name", KINDS)
def test_norms_keep_to_the_bound_of_clipped_gradients(name):
  """|S| <= eta g / (1 - beta), |M| <= |M_0| + t |S|: with the largest gates, and one pair written 32,768 times."""
  rule = deep(name, normalized=False)
  k, v = (jnp.broadcast_to(x[:1], x.shape) for x in stream(0))
  beta = 0.99 if rule.momentum else 0.0
  step = rule.gate_init(SEGMENT)["eta"].maximum * rule.max_grad_norm / (1 - beta)
  gates = {"alpha": 1.0 - 1e-6, "beta": beta, "eta": rule.gate_init(SEGMENT)["eta"].maximum}
  y, memory, momentum = write(rule, k, v, {gate: gates[gate] for gate in rule.gates})
  chex.assert_tree_all_finite((y, memory, momentum))
  assert (momentum <= 1.001 * step).all()
  assert (np.diff(memory) <= 1.001 * step * SEGMENT).all()


@pytest.mark.parametrize("name", KINDS)
def test_normalized_steps_stay_bounded_at_the_largest_gates(name):
  """One pair written 32,768 times with the largest steps: the memory answers with its value, more or less."""
  rule = deep(name)
  k, v = (jnp.broadcast_to(x[:1], x.shape) for x in stream(0))
  gates = {"alpha": 1.0 - 1e-6, "beta": 0.9, "eta": rule.gate_init(SEGMENT)["eta"].maximum}
  y, memory, momentum = write(rule, k, v, {gate: gates[gate] for gate in rule.gates})
  chex.assert_tree_all_finite((y, memory, momentum))
  if name != "dla":  # which adds the pair up as often as it comes
    assert np.abs(y[-SEGMENT:]).max() < 2 * np.abs(v).max()


@pytest.mark.parametrize(("normalized", "old"), [(False, jnp.inf), (True, 1e15)])
def test_documents_that_start_in_a_chunk_do_not_revive_old_momentum(normalized, old):
  """Where a chunk is solved for, its documents meet in one product, with zeros: there states must be finite."""
  rule = rules.get("titans", chunk=8, normalized=normalized)
  init = rule.init(jax.random.key(0), heads=1, head_dim=4)
  k = jax.random.normal(jax.random.key(1), (1, 1, 8, 4))
  gates = {name: jnp.full((1, 1, 8), value) for name, value in rule.starting_gates(SEGMENT).items()}
  new = rule.start(init, k)
  start = new._replace(momentum=jax.tree.map(lambda s: s + old, new.momentum))
  index = documents.index(jnp.array([[1, 1, 1, 2, 2, 2, 2, 2]]))
  index = documents.Documents(*(x[:, None] for x in index))

  @jit
  def ends(start):
    end, memory = rule.write(start, init, k, k, gates, index, solve=solve)
    return end, rule.network(k, lambda layer, x: memory.read(layer, x, k.dtype))[:, :, 3:]

  chex.assert_trees_all_equal(ends(start), ends(new))
