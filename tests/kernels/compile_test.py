"""The kernels, compiled by the TPUs' own compiler for chips that are not there."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from marks import slow

from mc_jax import memory
from mc_jax.bench import kernel_cases
from mc_jax.memory import pallas
from mc_jax.models import value_table
from mc_jax.planning import topology

pytest.importorskip("libtpu", reason="holds the TPUs' compiler; wheels for Linux on x86_64 only")

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# The backward cases of writing contain the forward kernels.
CASES = (
  *("titans_write_bwd", "linear_write_bwd", "cached_read_matrix_fwd", "cached_read_matrix_bwd"),
  *("cached_read_deep_fwd", "cached_read_deep_bwd", "selected_read_fwd", "selected_read_bwd"),
)
# Whole networks of head_dim 256 do not fit in the 16 MiB of VMEM that a v4 has: the last test here has the reason.
TOO_LARGE = {("v4", 256, "titans_write_bwd"), ("v4", 256, "cached_read_deep_bwd")}


@pytest.fixture(autouse=True)
def forget_program():
  """Programs for TPUs are large, and none is used twice."""
  yield
  jax.clear_caches()


def compile_for(chip, fn, args):
  """Compiles for the chip, which kernels plan with by the mesh in context."""
  place = topology.one_chip(CHIPS[chip])
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
  with jax.set_mesh(place.mesh):
    return jax.jit(fn).lower(*args).compile()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("chip", "head_dim", "name"), sorted(set(itertools.product(CHIPS, (96, 128, 256), CASES)) - TOO_LARGE)
)
def test_kernels_compile(chip, head_dim, name):
  options = {"chunk": 128} if chip == "v4" and name == "titans_write_bwd" else {}  # 256 do not fit
  with jax.set_mesh(topology.one_chip(CHIPS[chip]).mesh):  # whose VMEM says how long blocks are
    fn, args, flops = getattr(kernel_cases, name)(head_dim, **options)
  text = compile_for(chip, fn, args).as_text()
  assert all(kernel in text for kernel in flops)


def layer(rule, head_dim, *, value_dim=None, heads=2, length=1024, documents=False, transform=jax.grad, **options):
  """(the gradient of a layer, its arguments): bfloat16 tokens, segments of 256."""
  vector, values = (
    kernel_cases.array(1, length, heads, width, dtype=jnp.bfloat16) for width in (head_dim, value_dim or head_dim)
  )
  gates = {
    name: kernel_cases.array(1, length, heads, *[head_dim] * gate.per_channel) for name, gate in rule.gates.items()
  }
  init = jax.eval_shape(lambda: rule.init(jax.random.key(0), heads=heads, head_dim=head_dim, value_dim=value_dim))
  ids = kernel_cases.array(1, length, dtype=jnp.int32) if documents else None

  def loss(args, ids):
    segmentation = memory.segments.constant(256)
    y = memory.memory_caching(*args, rule=rule, segmentation=segmentation, segment_ids=ids, **options)
    return y.astype(jnp.float32).sum()

  return transform(loss), ((vector, vector, values, vector, gates, init), ids)


@pytest.mark.parametrize("aggregation", [slow("none"), "residual", slow("grm"), slow("soup"), slow("ssc")])
def test_a_layer_takes_the_kernels_when_it_is_compiled_for_a_tpu(aggregation):
  """By the platform lowered for, on a machine whose default backend is a CPU; forward and backward."""
  fn, args = layer(memory.rules.get("linear", chunk=128), 128, aggregation=aggregation)
  text = compile_for("v5e", fn, args).as_text()
  reads = {"none": (), "ssc": ("selected_read_bwd",)}.get(aggregation, ("cached_read_bwd",))
  assert all(kernel in text for kernel in ("linear_write_fwd", "linear_write_bwd", *reads))


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["grm", "ssc"])
@pytest.mark.parametrize(
  ("chip", "head_dim", "value_dim"), [("v5e", 128, 256), ("v4", 128, 256), ("v6e", 256, 512), ("v5e", 128, 64)]
)
def test_values_of_another_width_than_keys_compile(chip, head_dim, value_dim, aggregation):
  rule, options = memory.rules.get("swla", chunk=128), dict(aggregation=aggregation, implementation="pallas")
  # The value as well: a sum's gradient alone needs no forward read.
  fn, args = layer(rule, head_dim, value_dim=value_dim, transform=jax.value_and_grad, **options)
  text = compile_for(chip, fn, args).as_text()
  reads = "selected_read" if aggregation == "ssc" else "cached_read"
  assert all(f"{kernel}_{way}" in text for kernel in ("swla_write", reads) for way in ("fwd", "bwd"))


@pytest.mark.parametrize("name", [name if name == "swla" else slow(name) for name in memory.RULES])
def test_every_rule_compiles_with_documents(name):
  fn, args = layer(memory.rules.get(name, chunk=64), 64, documents=True, implementation="pallas")
  assert f"{name}_write_bwd" in compile_for("v5e", fn, args).as_text()


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "head_dim", "chunk"), [("v5e", 256, 256), ("v6e", 128, 256), ("v4", 96, 128)])
def test_the_printed_rule_compiles(chip, head_dim, chunk):
  with jax.set_mesh(topology.one_chip(CHIPS[chip]).mesh):
    fn, args, _ = kernel_cases.titans_printed_write_bwd(head_dim, chunk)
  assert "titans_write_bwd" in compile_for(chip, fn, args).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["grm", "ssc"])
def test_a_layer_compiles_under_vmap(aggregation):
  fn, ((*tokens, init), _) = layer(memory.rules.get("linear", chunk=128), 128, aggregation=aggregation)
  tokens = jax.tree.map(lambda x: kernel_cases.array(2, *x.shape, dtype=x.dtype), tokens)
  text = compile_for(
    "v5e", jax.vmap(lambda tokens, init: fn((*tokens, init), None), (0, None)), (tokens, init)
  ).as_text()
  assert "linear_write_bwd" in text


def test_what_does_not_fit_is_refused_with_the_reason():
  """By the chip of the mesh in context: a v4 has too little VMEM for a network of head_dim 256, a v5p has enough."""
  rule = memory.rules.get("titans", chunk=128)
  init = jax.eval_shape(lambda: rule.init(jax.random.key(0), heads=2, head_dim=256))
  q = kernel_cases.array(1, 1024, 2, 256, dtype=jnp.bfloat16)
  fn, args = layer(rule, 256, aggregation="none", implementation="pallas")
  with jax.set_mesh(topology.one_chip(CHIPS["v4"]).mesh):
    assert "15 MiB of VMEM" in pallas.unsupported(rule, (256,) * 4, q, init)
    with pytest.raises(ValueError, match="implementation='pallas' does not support rule 'titans' at head_dim 256"):
      jax.eval_shape(fn, *args)
  with jax.set_mesh(topology.one_chip(CHIPS["v5p"]).mesh):
    assert pallas.unsupported(rule, (256,) * 4, q, init) is None


@pytest.mark.parametrize("chip", ["v5e", slow("v6e"), slow("v5p")])
def test_a_memory_layers_reads_compile_with_their_gradients(chip):
  def gradients(values, rows, weights, cotangent):
    y, back = jax.vjp(lambda values, weights: value_table.read(values, rows, weights), values, weights)
    return y, back(cotangent)

  array = kernel_cases.array
  rows = array(16, 2, 8, dtype=jnp.int32)
  text = compile_for(chip, gradients, (array(4096, 128), rows, array(16, 2, 8), array(16, 128))).as_text()
  assert "rows_sum_fwd" in text and "rows_scores_bwd" in text
