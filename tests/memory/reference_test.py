"""The reference against numpy written by hand: what every fast path is compared with is itself held to something."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from quick_compile import jit

from mc_jax import memory
from mc_jax.memory import rules, segments

HEAD_DIM = 3
LENGTH = 9  # and the same options where it does not matter: tests then share what was compiled
CHUNKS = [[2], [2], [2], [2], [1]]
DEFAULTS = dict(aggregation="none", segmentation=segments.constant(2), top_k=1, implementation="reference")
NAMES = "rule", *DEFAULTS, "carry", "pool", "gate", "gate_scale"
caching = jit(memory.memory_caching, static_argnames=NAMES)

TITANS = rules.get("titans", chunk=2, expansion=2, max_grad_norm=None, normalized=False)
SWLA = rules.get("swla", chunk=2, window=3)
LINEAR = rules.get("linear", chunk=2)


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def inputs(rule, *, batch=1, length=LENGTH, heads=1, seed=0):
  """Random q, k, v, u, gates, init, token_scores in float64, M_0 of matrices not zero."""
  rng = np.random.default_rng(seed)
  q, k, v, u = rng.normal(size=(4, batch, length, heads, HEAD_DIM))
  gates = {name: rng.uniform(0.3, 0.95, (batch, length, heads)) for name in rule.gates}
  shapes = jax.eval_shape(functools.partial(rule.init, heads=heads, head_dim=HEAD_DIM), jax.random.key(0))
  init = jax.tree.map(lambda w: 0.5 * rng.normal(size=w.shape), shapes)
  return (q, k, v, u, gates, init), rng.normal(size=(batch, length, heads, len(CHUNKS)))


def run(rule, args, segment_ids=None, token_scores=None, **options):
  return np.asarray(caching(*args, rule=rule, **DEFAULTS | options, segment_ids=segment_ids, token_scores=token_scores))


def row(args, *, start=0):
  """The only row and head of `inputs`, as by_hand takes it, from token `start` on."""
  q, k, v, u, gates, init = args
  return (
    *(x[0, start:, 0] for x in (q, k, v, u)),
    {n: g[0, start:, 0] for n, g in gates.items()},
    {n: w[0] for n, w in init.items()},
  )


# Numpy by hand: memories, their gradients, and the recurrence.


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x):
  tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
  return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)


def read(weights, x):
  if "w" in weights:
    return x @ weights["w"]
  return x + gelu(x @ weights["w1"]) @ weights["w2"]


def gradient(rule, weights, k, v):
  """Of -<M(k), v> or ||M(k) - v||^2 by the weights, by the chain rule."""
  delta = -v if rule.loss is rules.dot_loss else 2 * (read(weights, k) - v)
  if "w" in weights:
    return {"w": np.outer(k, delta)}
  z = k @ weights["w1"]
  return {"w1": np.outer(k, (weights["w2"] @ delta) * gelu_slope(z)), "w2": np.outer(gelu(z), delta)}


def states_by_hand(rule, k, v, gates, init, chunks, carry):
  """M_t after each token of one document; `chunks` lists the lengths of the chunks of every segment, [[2, 1], [2]]."""
  memory, momentum, states, t = init, dict.fromkeys(init, 0.0), [], 0
  for segment in chunks:
    first = 0
    if carry == "independent":
      memory, momentum, first = init, dict.fromkeys(init, 0.0), t
    for chunk in segment:
      frozen = memory
      for _ in range(chunk):
        step = dict.fromkeys(init, 0.0)
        for i in range(min(rule.window, t - first + 1)):
          g = gradient(rule, frozen, k[t - i], v[t - i])
          norm = np.sqrt(sum((x**2).sum() for x in g.values()))
          scale = min(1.0, rule.max_grad_norm / norm) if rule.max_grad_norm else 1.0
          eta = gates["eta" if rule.window == 1 else f"eta{i}"][t] if rule.step else 1.0
          step = {name: step[name] - eta * scale * g[name] for name in init}
        momentum = {name: (gates["beta"][t] * momentum[name] if rule.momentum else 0) + step[name] for name in init}
        memory = {name: (gates["alpha"][t] if rule.retention else 1) * memory[name] + momentum[name] for name in init}
        states.append(memory)
        t += 1
  return states


def by_hand(
  rule,
  q,
  k,
  v,
  u,
  gates,
  init,
  chunks,
  carry="checkpoint",
  aggregation="none",
  pool=np.mean,
  gate="softmax",
  scale=1.0,
  top_k=1,
  token_scores=None,
):
  states = states_by_hand(rule, k, v, gates, init, chunks, carry)
  y, caches, summaries, first = [], [], [], 0
  for segment in chunks:
    for t in range(first, first + sum(segment)):
      memories, summary = [*caches, states[t]], pool(k[first : t + 1], axis=0)
      scores = np.array([u[t] @ p for p in [*summaries, summary]])
      if gate == "token":
        scores = token_scores[t, : len(memories)][::-1]
      scores = scale * scores
      if aggregation == "none":
        memories, scores = memories[-1:], scores[-1:]
      if aggregation == "ssc":
        kept = [*np.argsort(-scores[:-1])[:top_k], len(scores) - 1]
        memories, scores = [memories[i] for i in kept], scores[kept]
      if gate == "constant" or aggregation in ("none", "residual"):
        gamma = np.ones(len(memories))
      elif gate == "uniform":
        gamma = np.full(len(memories), 1 / len(memories))
      elif gate == "sigmoid":
        gamma = 1 / (1 + np.exp(-scores))
      else:
        gamma = np.exp(scores) / np.exp(scores).sum()
      if aggregation == "soup":
        y.append(read({n: sum(g * m[n] for g, m in zip(gamma, memories, strict=True)) for n in init}, q[t]))
      else:
        y.append(sum(g * read(m, q[t]) for g, m in zip(gamma, memories, strict=True)))
    caches, summaries, first = [*caches, states[t]], [*summaries, summary], t + 1
  return np.stack(y)


# Writing.


def test_linear_is_causal_linear_attention():
  args, _ = inputs(LINEAR, batch=2, heads=2)
  q, k, v, u, gates, init = args
  scores = np.einsum("bthd,bshd->bhts", q, k) * np.tri(q.shape[1])
  expected = np.einsum("bhts,bshd->bthd", scores, v)
  zero = jax.tree.map(np.zeros_like, init)
  chex.assert_trees_all_close(run(LINEAR, (q, k, v, u, gates, zero)), expected, atol=1e-12)
  expected += np.einsum("bthd,hde->bthe", q, init["w"])
  chex.assert_trees_all_close(run(LINEAR, args), expected, atol=1e-12)


@pytest.mark.parametrize(
  ("rule", "carry", "segmentation", "chunks"),
  [
    (
      rules.get("titans", chunk=1, expansion=2, max_grad_norm=None, normalized=False),
      "checkpoint",
      segments.constant(3),
      [[1] * 7],
    ),
    slow(TITANS, "checkpoint", segments.constant(3), [[2, 1], [2, 1], [1]]),
    (TITANS, "independent", segments.logarithmic(), [[2, 2], [2], [1]]),
    (
      rules.get("dla", chunk=4, expansion=2, retention=False, max_grad_norm=1.5, normalized=False),
      "checkpoint",
      segments.constant(5),
      [[4, 1], [2]],
    ),
    slow(dataclasses.replace(TITANS, window=2), "checkpoint", segments.constant(3), [[2, 1], [2, 1], [1]]),
    slow(SWLA, "checkpoint", segments.constant(3), [[7]]),
    (SWLA, "independent", segments.constant(3), [[3], [3], [1]]),
  ],
  ids=lambda x: x.name if isinstance(x, rules.Rule) else None,
)
def test_writing_is_the_recurrence(rule, carry, segmentation, chunks):
  args, _ = inputs(rule, length=7)
  expected = by_hand(rule, *row(args), chunks, carry)
  actual = run(rule, args, carry=carry, segmentation=segmentation)[0, :, 0]
  chex.assert_trees_all_close(actual, expected, atol=1e-10)


def test_a_gradient_norm_is_clipped_over_all_layers_and_some_tokens_only():
  args, _ = inputs(TITANS)
  _, k, v, *_, init = row(args)
  norms = [np.sqrt(sum((g**2).sum() for g in gradient(TITANS, init, *kv).values())) for kv in zip(k, v, strict=True)]
  rule = dataclasses.replace(TITANS, max_grad_norm=float(np.median(norms)))
  expected = by_hand(rule, *row(args), CHUNKS)
  chex.assert_trees_all_close(run(rule, args)[0, :, 0], expected, atol=1e-10)


# Reading.


@pytest.mark.parametrize("carry", ["checkpoint", "independent"])
def test_residual_is_a_sum(carry):
  args, _ = inputs(SWLA)
  expected = by_hand(SWLA, *row(args), CHUNKS, carry, "residual")
  chex.assert_trees_all_close(run(SWLA, args, carry=carry, aggregation="residual")[0, :, 0], expected, atol=1e-10)


def test_residual_of_independent_linear_memories_is_the_plain_recurrence():
  args, _ = inputs(LINEAR, batch=2, heads=2)
  *tokens, gates, init = args
  args = *tokens, gates, jax.tree.map(np.zeros_like, init)
  residual = run(LINEAR, args, aggregation="residual", carry="independent")
  chex.assert_trees_all_close(residual, run(LINEAR, args), atol=1e-12)  # Eq. 13


def test_gated_residual_memory_of_two_segments_in_figures():
  """M^(1) = k_1 v_1, then M_2 = k_2 v_2, with keys, values and queries that can be followed by eye (Eq. 9-10)."""
  one, two = np.eye(HEAD_DIM)[:2]
  k, v, q, u = np.stack([one, two]), np.stack([3 * one, 5 * one]), np.stack([one, one + two]), np.stack([one, 2 * one])
  args = *(x[None, :, None] for x in (q, k, v, u)), {}, {"w": np.zeros((1, HEAD_DIM, HEAD_DIM))}
  y = run(LINEAR, args, aggregation="grm", segmentation=segments.constant(1), carry="independent")[0, :, 0]
  old, new = np.exp(2) / (np.exp(2) + 1), 1 / (np.exp(2) + 1)  # <u_2, k_1> = 2, <u_2, k_2> = 0
  chex.assert_trees_all_close(y, np.stack([3 * one, (3 * old + 5 * new) * one]), atol=1e-12)


@pytest.mark.parametrize(
  ("rule", "options"),
  [
    (SWLA, {"aggregation": "grm", "pool": "sum", "gate_scale": 0.7}),
    (SWLA, {"aggregation": "grm", "gate": "sigmoid", "carry": "independent"}),
    (SWLA, {"aggregation": "grm", "gate": "constant"}),
    (SWLA, {"aggregation": "grm", "gate": "uniform"}),
    (SWLA, {"aggregation": "grm", "gate": "token", "gate_scale": 0.7}),
    slow(SWLA, {"aggregation": "ssc", "top_k": 1}),
    (SWLA, {"aggregation": "ssc", "top_k": 2, "gate": "sigmoid"}),
    slow(SWLA, {"aggregation": "ssc", "top_k": 2, "gate": "token"}),
    slow(TITANS, {"aggregation": "grm"}),
    (TITANS, {"aggregation": "soup"}),
    slow(TITANS, {"aggregation": "soup", "gate": "sigmoid", "carry": "independent"}),
  ],
  ids=lambda x: x.name if isinstance(x, rules.Rule) else "-".join(map(str, x.values())),
)
def test_reading_is_the_gated_sum(rule, options):
  args, token_scores = inputs(rule)
  by_name = options | {"pool": {"mean": np.mean, "sum": np.sum}[options.get("pool", "mean")]}
  by_name["scale"] = by_name.pop("gate_scale", 1.0)
  expected = by_hand(rule, *row(args), CHUNKS, token_scores=token_scores[0, :, 0], **by_name)
  actual = run(rule, args, token_scores=token_scores if options.get("gate") == "token" else None, **options)[0, :, 0]
  chex.assert_trees_all_close(actual, expected, atol=1e-10)


def test_soup_is_grm_for_matrices_and_ssc_is_grm_when_it_keeps_all():
  args, _ = inputs(SWLA)
  grm = run(SWLA, args, aggregation="grm")
  chex.assert_trees_all_close(run(SWLA, args, aggregation="soup"), grm, atol=1e-12)
  chex.assert_trees_all_close(run(SWLA, args, aggregation="ssc", top_k=4), grm, atol=1e-12)


@pytest.mark.parametrize("carry", ["checkpoint", slow("independent")])
@pytest.mark.parametrize("aggregation", ["none", "residual", "grm", "soup", "ssc"])
def test_no_token_sees_its_future(aggregation, carry):
  (*tokens, gates, init), _ = inputs(SWLA)
  call = functools.partial(run, SWLA, aggregation=aggregation, carry=carry)
  before = call((*tokens, gates, init))
  for t in (0, 4, 5, 8):
    *changed, changed_gates = jax.tree.map(lambda x: halved(x, t), (*tokens, gates))
    after = call((*changed, changed_gates, init))
    chex.assert_trees_all_equal(after[:, :t], before[:, :t])
    assert np.all(after[:, t] != before[:, t])


def halved(x, t):
  """x [batch, length, ...] with half of it at token t."""
  x = x.copy()
  x[:, t] *= 0.5
  return x


# Documents.

IDS = np.array([7, 2, 2, 2, 2, 2, 2, 0, 2, 2, 5, 5])  # four documents: the 2s after the padding are another one


@pytest.mark.parametrize(
  ("rule", "options"),
  [
    slow(TITANS, {"aggregation": "grm"}),
    (dataclasses.replace(SWLA, chunk=3), {"aggregation": "ssc", "carry": "independent"}),
  ],
  ids=lambda x: x.name if isinstance(x, rules.Rule) else "",
)
def test_other_documents_may_as_well_be_padding(rule, options):
  """Outputs and gradients of a document do not change when every other token becomes padding, of another content."""
  documents = [
    np.arange(12) == 0,
    (np.arange(12) > 0) & (np.arange(12) < 7),
    (IDS == 2) & (np.arange(12) > 7),
    IDS == 5,
  ]
  (*tokens, init), _ = inputs(rule, length=12)
  (*others, _), _ = inputs(rule, length=12, seed=1)

  @jit
  def outputs_and_gradients(tokens, init, ids, own):
    def loss(tokens, init):
      y = memory.memory_caching(
        *tokens,
        init,
        rule=rule,
        **DEFAULTS | options | {"segmentation": segments.constant(4)},
        segment_ids=ids,
      )
      return jnp.sum(jnp.where(own[None, :, None, None], jnp.sin(y), 0)), y

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(tokens, init)

  for own in documents:
    (d_tokens, d_init), y = outputs_and_gradients(tokens, init, IDS[None], own)
    mixed = jax.tree.map(lambda x, other: np.where(own.reshape(1, -1, *[1] * (x.ndim - 2)), x, other), tokens, others)
    alone_gradients, alone = outputs_and_gradients(mixed, init, np.where(own, IDS, 0)[None], own)
    chex.assert_trees_all_close(alone[:, own], y[:, own], atol=1e-12)
    chex.assert_trees_all_close(alone_gradients, (d_tokens, d_init), atol=1e-11)
    chex.assert_trees_all_equal(alone[:, ~own], jnp.zeros_like(alone[:, ~own]))
    if own.sum() > 4:  # a document of more than one segment: everything is used
      assert all(np.any(g[:, own] != 0) for g in jax.tree.leaves(d_tokens))
  nobody = np.zeros(12, bool)
  gradients, y = outputs_and_gradients(tokens, init, np.zeros((1, 12), int), nobody)
  chex.assert_tree_all_finite(gradients)
  chex.assert_trees_all_equal(y, jnp.zeros_like(y))


@pytest.mark.parametrize("carry", ["checkpoint", slow("independent")])
def test_a_document_starts_afresh_on_the_grid_of_its_row(carry):
  """A document that starts at the second token of a segment of four: its chunks are what the row's grid leaves it."""
  args, _ = inputs(TITANS)
  ids = np.array([[1, 2, 2, 2, 2, 2, 2, 2, 2]])
  expected = by_hand(TITANS, *row(args, start=1), [[1, 2], [2, 2], [1]], carry, "grm")
  options = {"aggregation": "grm", "segmentation": segments.constant(4), "carry": carry}
  actual = run(TITANS, args, segment_ids=ids, **options)[0, 1:, 0]
  chex.assert_trees_all_close(actual, expected, atol=1e-10)


def test_a_memory_that_overflowed_harms_its_own_document_only():
  (q, k, v, u, gates, init), _ = inputs(LINEAR)
  ids = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2]])
  quiet = run(LINEAR, (q, k, v, u, gates, init), segment_ids=ids, aggregation="grm")
  loud = np.where(ids[..., None, None] == 1, 1e200, 1)
  y = run(LINEAR, (q, k * loud, v * loud, u, gates, init), segment_ids=ids, aggregation="grm")
  assert not np.isfinite(y[:, :5]).any()
  chex.assert_trees_all_equal(y[:, 5:], quiet[:, 5:])


def test_states_are_float32_at_least_and_the_output_is_as_the_query():
  args, _ = inputs(LINEAR)
  args = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), args)
  y = caching(*args, rule=LINEAR, **DEFAULTS, segment_ids=None, token_scores=None)
  chex.assert_type(y, jnp.bfloat16)
  exact = caching(*jax.tree.map(jnp.float64, args), rule=LINEAR, **DEFAULTS, segment_ids=None, token_scores=None)
  chex.assert_trees_all_equal(y, exact.astype(jnp.bfloat16))
