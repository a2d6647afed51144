"""The TPU kernels, interpreted, against XLA: values and gradients, what they refuse, and where they run."""

import functools
import logging
import re
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples
from jax.experimental.pallas import tpu as pltpu
from marks import slow

from mc_jax import memory
from mc_jax.kernels import vmem
from mc_jax.memory import documents as memory_documents
from mc_jax.memory import pallas, rules, segments, xla
from mc_jax.memory.tokens import Tokens
from mc_jax.planning import topology

LENGTH, SEGMENT, CHUNK = 51, 16, 8
SEGMENT_IDS = np.array(
  [
    # Several starts in the first chunk, one of them a single token; padding in the middle; an id used again, from a
    # segment's last token on (15); a start in the middle of a chunk (35).
    [1] * 5 + [2] + [3] * 6 + [0] * 3 + [1] * 20 + [4] * 16,
    # Padding at both ends and at a segment's end; a document that starts on a segment boundary (16).
    [0] * 2 + [5] * 12 + [0] * 2 + [6] * 30 + [0] * 5,
    # A long document, which sees all three caches.
    [7] + [8] * 50,
    [0] * 51,
  ]
)


class Case(NamedTuple):
  """What is compared; tolerance of ||kernels - XLA|| / ||XLA||, array by array, of u's gradient perhaps another.

  Softmax's gradient, which u alone has, is made of differences of reads (precision_test.py).
  """

  rule: rules.Rule
  options: dict
  length: int = LENGTH
  segment: int = SEGMENT
  head_dim: int = 8
  dtype: type = np.float32
  documents: bool = True
  tolerance: float = 1e-5
  connector_tolerance: float | None = None


def rounded(x, dtype):
  """Inputs in a dtype, M_0 in float32."""
  x = jax.tree.map(lambda w: w.astype(dtype), x)
  return x._replace(init=jax.tree.map(np.float32, x.init))


def inputs_of(case):
  """Inputs and segment_ids; padding holds NaN."""
  segment_ids = SEGMENT_IDS[:, : case.length] if case.documents else None
  ages = -(-case.length // case.segment) if case.options.get("gate") == "token" else None
  sizes = dict(length=case.length, head_dim=case.head_dim, ages=ages)
  x = rounded(samples.inputs(case.rule, batch=4 if case.documents else 1, **sizes), case.dtype)
  if case.documents:
    x = samples.select(segment_ids > 0, x, np.nan)
    x = rounded(x, case.dtype)
  return x, segment_ids


def assert_kernels_are_xla(case):
  x, segment_ids = inputs_of(case)
  options = dict(rule=case.rule, segmentation=segments.constant(case.segment), **case.options)
  cotangent = samples.like(x.q)
  kernels, plain = (
    samples.forward_and_back(implementation=name, **options)(x, segment_ids, cotangent) for name in ("pallas", "xla")
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(kernels, plain)
  for (path, a), b in zip(jax.tree.leaves_with_path(kernels), jax.tree.leaves(plain), strict=True):
    a, b, name = np.asarray(a, np.float64), np.asarray(b, np.float64), jax.tree_util.keystr(path)
    tolerance = (name.endswith(".u") and case.connector_tolerance) or case.tolerance
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), name
  if case.documents:
    y, gradient = kernels
    for g in (y, *samples.tokens(gradient).values()):
      assert not g[segment_ids == 0].any()


# Options that do not depend on each other go by carry, so that each is seen with every rule and aggregation.
RULES = {
  "checkpoint": {
    "linear": rules.get("linear", chunk=CHUNK),
    "swla": rules.get("swla", chunk=CHUNK),
    "dla": rules.get("dla", chunk=CHUNK, depth=1, max_grad_norm=0.7, normalized=False),
    "titans": rules.get("titans", chunk=CHUNK, expansion=2, normalized=False),
  },
  "independent": {
    "linear": rules.get("linear", chunk=CHUNK),
    "swla": rules.get("swla", chunk=CHUNK, window=3),
    "dla": rules.get("dla", chunk=CHUNK, expansion=2, norm=True, normalized=False),
    "titans": rules.get("titans", chunk=CHUNK, expansion=2, max_grad_norm=2.0, normalized=False),
  },
}
OPTIONS = {
  "checkpoint": dict(pool="mean", gate="softmax", gate_scale=1.5, top_k=2),
  "independent": dict(pool="sum", gate="sigmoid", top_k=1, segment_group=2),
}
NAMES = samples.GRADIENT_RULES, memory.AGGREGATIONS, memory.CARRIES
# Every rule with every aggregation, the carries by turns, and the quick ones.
COMBINATIONS = [
  case
  for case in samples.COMBINATIONS
  if not case.marks or sum(all_.index(name) for all_, name in zip(NAMES, case.values, strict=True)) % 2 == 0
]


@pytest.mark.parametrize(("rule", "aggregation", "carry"), COMBINATIONS)
def test_kernels_give_what_xla_gives(rule, aggregation, carry):
  assert_kernels_are_xla(Case(RULES[carry][rule], dict(aggregation=aggregation, carry=carry, **OPTIONS[carry])))


LINEAR = rules.get("linear", chunk=CHUNK)
SWLA = rules.get("swla", chunk=CHUNK)
TITANS = rules.get("titans", chunk=CHUNK, expansion=2, normalized=False)
BFLOAT16 = dict(dtype=jnp.bfloat16, segment=16, tolerance=2**-7)
# Errors are solved for by products of three bfloat16 parts, 2^-16 off: what either program leaves of its own sums'
# order is rounded by them.
SOLVED = dict(tolerance=2**-15)


def slow_case(*args, **kwargs):
  return slow(Case(*args, **kwargs))


@pytest.mark.parametrize(
  "case",
  [
    # No documents, and lengths that are no multiple of a chunk or segment, and one that is.
    slow_case(TITANS, dict(aggregation="grm"), documents=False, length=48),
    slow_case(SWLA, dict(aggregation="soup", carry="independent"), documents=False, length=41),
    slow_case(LINEAR, dict(aggregation="ssc", carry="independent"), documents=False),
    # One segment: as long as the row, longer, shorter than a chunk.
    slow_case(TITANS, dict(aggregation="ssc"), length=16),
    slow_case(SWLA, dict(aggregation="grm"), length=21, segment=64),
    slow_case(TITANS, dict(aggregation="soup", carry="independent"), length=5),
    slow_case(LINEAR, dict(aggregation="residual"), length=13, documents=False),
    # Chunks as long as a segment, or longer.
    slow_case(rules.get("swla", chunk=16, window=3), dict(aggregation="none")),
    slow_case(
      rules.get("titans", chunk=64, expansion=2, normalized=False), dict(aggregation="grm", carry="independent")
    ),
    # Widths, depths.
    slow_case(rules.get("titans", chunk=CHUNK, expansion=4, normalized=False), dict(aggregation="grm"), head_dim=12),
    slow_case(
      rules.get("dla", chunk=CHUNK, depth=3, expansion=2, norm=True, normalized=False), dict(aggregation="soup")
    ),
    slow_case(rules.get("titans", chunk=CHUNK, depth=1, norm=True, normalized=False), dict(aggregation="ssc")),
    slow_case(
      rules.get("titans", chunk=CHUNK, depth=3, expansion=1, normalized=False),
      dict(aggregation="ssc", carry="independent"),
    ),
    slow_case(
      rules.get("dla", chunk=CHUNK, retention=False, max_grad_norm=None, normalized=False), dict(aggregation="none")
    ),
    # Steps in units of the error; errors solved for in blocks of 64 tokens and fewer.
    Case(rules.get("titans", chunk=CHUNK, expansion=2), dict(aggregation="grm"), **SOLVED),
    slow_case(
      rules.get("titans", chunk=72, expansion=1),
      dict(aggregation="none"),
      length=80,
      segment=72,
      documents=False,
      **SOLVED,
    ),
    # Of u's gradient both programs are 2% off float64.
    slow_case(
      rules.get("titans", chunk=16, expansion=2), dict(aggregation="grm"), **BFLOAT16, connector_tolerance=2**-6
    ),
    slow_case(rules.get("dla", chunk=CHUNK, expansion=2), dict(aggregation="soup", carry="independent")),
    # Gates and numbers of caches.
    Case(LINEAR, dict(aggregation="grm", gate="token")),
    slow_case(LINEAR, dict(aggregation="soup", gate="constant", pool="sum")),
    slow_case(SWLA, dict(aggregation="ssc", gate="token", top_k=5)),
    slow_case(SWLA, dict(aggregation="ssc", gate="constant", carry="independent", top_k=1)),
    # bfloat16, in which an output, or an operand, is rounded the other way when a sum is taken in another order.
    slow_case(rules.get("titans", chunk=16, expansion=2, normalized=False), dict(aggregation="grm"), **BFLOAT16),
    Case(rules.get("swla", chunk=16), dict(aggregation="ssc", carry="independent"), **BFLOAT16),
    slow_case(rules.get("linear", chunk=16), dict(aggregation="residual"), **BFLOAT16),
    slow_case(rules.get("dla", chunk=16, expansion=2, normalized=False), dict(aggregation="soup"), **BFLOAT16),
  ],
  ids=lambda case: f"{case.rule.name}-{'-'.join(map(str, case.options.values()))}-{case.length}",
)
def test_every_shape_and_option_gives_what_xla_gives(case):
  assert_kernels_are_xla(case)


@pytest.mark.parametrize(
  ("rule", "documents"),
  [
    slow(TITANS, False),
    (TITANS, True),
    (rules.get("swla", chunk=CHUNK, window=3), False),
    slow(rules.get("swla", chunk=CHUNK, window=3), True),
  ],
  ids=lambda x: getattr(x, "name", x),
)
def test_a_ragged_end_leaves_the_states_as_they_are(rule, documents):
  """Momentum and window as well, which no token reads: what fills the last segment up is padding."""
  length = 43 if documents else LENGTH  # one ends in the middle of a document
  x = rounded(samples.inputs(rule, batch=4, length=length, head_dim=8), np.float32)
  index = None
  if documents:
    x = samples.select(SEGMENT_IDS[:, :length] > 0, x, 0)
    index = memory_documents.Documents(*(w[:, None] for w in memory_documents.index(SEGMENT_IDS[:, :length])))
  tokens = Tokens(*jax.tree.map(lambda w: jnp.moveaxis(w, 2, 1), x[:5]), index)
  lengths = segments.constant(SEGMENT).lengths(length)

  def read(memory, q):
    return rule.network(q, lambda name, z: memory.read(name, z, q.dtype))

  def states(write):
    run = functools.partial(write, rule, lengths=lengths, read=read, carries=True, side_by_side=1)
    return samples.jit(lambda init, tokens: run(init, tokens).states)(x.init, tokens)

  kernels, plain = states(functools.partial(pallas.write, interpret=True)), states(xla.write)
  assert len(plain.memory[next(iter(plain.memory))]) == len(lengths)
  chex.assert_trees_all_close(kernels, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("rule", "aggregation", "carry"),
  [
    (SWLA, "soup", "checkpoint"),
    slow(TITANS, "grm", "checkpoint"),
    slow(LINEAR, "ssc", "independent"),
  ],
  ids=lambda x: getattr(x, "name", x),
)
def test_kernels_give_what_the_reference_gives(rule, aggregation, carry):
  """Values and, along random directions, gradients, of the reference in float64."""
  exact = samples.inputs(rule, head_dim=8, length=LENGTH)
  exact = jax.tree.map(lambda w: np.float64(np.float32(w)), exact)
  x = rounded(exact, np.float32)
  options = dict(rule=rule, aggregation=aggregation, carry=carry, segmentation=segments.constant(SEGMENT), top_k=1)
  cotangent, directions = samples.like(x.q), samples.like(exact, seed=2)
  y, gradient = samples.forward_and_back(implementation="pallas", **options)(x, SEGMENT_IDS, cotangent)
  with jax.enable_x64(True):
    reference = samples.forward(implementation="reference", **options)
    expected = reference(exact, SEGMENT_IDS)
    slopes = samples.derivatives(lambda x: np.vdot(reference(x, SEGMENT_IDS), cotangent), exact, directions)
  assert np.linalg.norm(y - expected) < 1e-5 * np.linalg.norm(expected)
  got = samples.along(gradient, directions)
  sizes = {name: np.linalg.norm(g) for name, g in zip(got, jax.tree.leaves(gradient), strict=True)}
  for name, slope in slopes.items():
    assert abs(got[name] - slope) < 1e-4 * sizes[name] + 1e-6, name


# Where the kernels run, and what they refuse.


def layer(implementation, **options):
  options = dict(rule=TITANS, aggregation="grm", segmentation=segments.constant(SEGMENT)) | options
  return functools.partial(samples.call, implementation=implementation, **options)


@pytest.mark.slow
def test_by_default_a_program_has_the_kernels_on_tpus_and_nothing_of_them_elsewhere():
  x = rounded(samples.inputs(TITANS, batch=1, length=LENGTH, head_dim=8), np.float32)

  def lowered(implementation, platform):
    program = jax.jit(jax.grad(lambda x: layer(implementation)(x).sum())).trace(x)
    return program.lower(lowering_platforms=(platform,)).as_text()

  def operations(text):
    return {name: text.count(f"stablehlo.{name}") for name in ("while", "dot_general", "dynamic_slice")}

  for platform in ("cpu", "cuda"):
    assert operations(lowered(None, platform)) == operations(lowered("xla", platform))
  assert operations(lowered("pallas", "cpu")) != operations(lowered("xla", "cpu"))
  pytest.importorskip("libtpu", reason="kernels are lowered for a chip, which a topology names")
  with jax.set_mesh(topology.one_chip("v5e:2x2").mesh):
    kernels = lowered(None, "tpu")
    assert "tpu_custom_call" not in lowered("xla", "tpu")
  for name in ("titans_write_fwd", "titans_write_bwd"):
    assert name in kernels
  assert "tpu_custom_call" in kernels


@pytest.mark.parametrize(
  ("dtype", "options", "message"),
  [
    (np.float64, {}, "float64 inputs"),
    slow(np.float16, {}, "float16 inputs"),
    slow(np.float32, dict(segmentation=segments.logarithmic()), "segments of different lengths"),
    slow(np.float32, dict(segmentation=segments.constant(12)), "chunks of 8 tokens in segments of 12"),
    (
      np.float32,
      dict(rule=rules.get("titans", chunk=4, expansion=2, normalized=False)),
      "chunks of 4 tokens (a multiple of 8 is",
    ),
    slow(jnp.bfloat16, {}, "chunks of 8 tokens (a multiple of 16 is"),
  ],
  ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_kernels_do_not_support_is_named_or_left_to_xla(dtype, options, message):
  with jax.enable_x64(dtype == np.float64):
    x = rounded(samples.inputs(TITANS, batch=1, length=LENGTH, heads=1, head_dim=8), dtype)
    with pytest.raises(ValueError, match=re.escape(f"implementation='pallas' does not support {message}")):
      jax.eval_shape(layer("pallas", **options), x)
    y, plain = (samples.jit(layer(name, **options))(x) for name in (None, "xla"))
    chex.assert_trees_all_equal(y, plain)
    assert y.dtype == dtype


def test_what_does_not_fit_in_vmem_is_named(monkeypatch):
  x = rounded(samples.inputs(TITANS, batch=1, length=LENGTH, heads=1, head_dim=8), np.float32)
  jax.eval_shape(layer("pallas"), x)
  monkeypatch.setattr(vmem, "capacity", lambda: 1 << 18)
  with pytest.raises(ValueError, match=r"rule 'titans' at head_dim 8, .* MiB of VMEM"):
    jax.eval_shape(layer("pallas"), x)


def test_a_fallback_is_logged_once_where_there_is_a_tpu(monkeypatch, caplog):
  with caplog.at_level(logging.WARNING):
    pallas.log_fallback("a test on a CPU")
    assert not caplog.records
    monkeypatch.setattr(pltpu, "is_tpu_device", lambda: True)
    pallas.log_fallback("a test on a TPU")
    pallas.log_fallback("a test on a TPU")
  assert [record.getMessage() for record in caplog.records] == [
    "memory_caching runs without kernels: they do not support a test on a TPU"
  ]
