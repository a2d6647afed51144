"""Memory Caching on meshes of virtual devices: the numbers of one device, and what each device keeps and gathers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples
from marks import slow

from mc_jax import memory
from mc_jax.parallel import context, mesh, reading, selecting

LENGTH, SEGMENT, CHUNK = 32, 4, 2
# On four devices they end at 7, 15, 23. Documents that go on over one border, over three, start on one (24) and one
# token before one (15), padding at a border and at the end; a row of one document; a row of padding.
SEGMENT_IDS = np.array(
  [
    np.repeat([1, 2, 3, 0, 4, 5], [5, 9, 6, 3, 1, 8]),
    np.repeat([1, 2, 3, 0], [7, 8, 16, 1]),
    np.full(LENGTH, 7),
    np.zeros(LENGTH, int),
  ]
)
MESHES = [dict(data=1, context=4, model=2), dict(data=2, context=2, model=2), dict(data=1, fsdp=2, context=4)]


def build(rule, **options):
  options = {"chunk": CHUNK} | ({"expansion": 2} if rule in ("dla", "titans") else {}) | options
  return memory.rules.get(rule, **options)


def on(axes):
  """A mesh of the first devices."""
  count = np.prod(list(axes.values()))
  return mesh.make(mesh.MeshConfig(**axes), jax.devices()[:count])


def on_mesh(q, k, v, u, gates, init, *, segment_ids=None, token_scores=None, read_buffer=256 << 20, **options):
  """`context.run` with the arguments of `memory.memory_caching`."""
  documents = None if segment_ids is None else memory.documents.index(segment_ids)
  tokens = memory.Tokens(q, k, v, u, gates, documents, token_scores)
  return context.run(tokens, init, memory.Options(**options), read_buffer=read_buffer)


def run(x, rule, axes=None, *, segment=SEGMENT, **options):
  """Outputs and the gradients of a sum over them, by one device or a mesh."""
  options = dict(rule=rule, segmentation=memory.segments.constant(segment), implementation="xla") | options
  function = memory.memory_caching if axes is None else on_mesh

  def loss(x):
    y = function(x.q, x.k, x.v, x.u, x.gates, x.init, token_scores=x.token_scores, **options)
    return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

  compiled = samples.jit(jax.grad(loss, has_aux=True))
  if axes is None:
    return jax.device_get(compiled(x))
  with jax.set_mesh(on(axes)):
    return jax.device_get(compiled(x))


def assert_same(actual, desired, tolerance=1e-9):
  """Equal to a relative tolerance of each array's largest number."""
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-30))


COMBINATIONS = [case.values for case in samples.COMBINATIONS]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("rule", "aggregation", "carry"), samples.COMBINATIONS)
def test_numbers_of_one_device(rule, aggregation, carry):
  axes = MESHES[COMBINATIONS.index((rule, aggregation, carry)) % len(MESHES)]
  rule = build(rule)
  x = samples.inputs(rule, length=LENGTH)
  options = dict(aggregation=aggregation, carry=carry, segment_ids=SEGMENT_IDS)
  assert_same(run(x, rule, axes, **options), run(x, rule, **options))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
  ("rule", "value_dim", "options"),
  [
    ("swla", 8, dict(aggregation="grm")),
    slow("swla", 2, dict(aggregation="soup")),
    slow("swla", 8, dict(aggregation="ssc", read_buffer=1)),
    slow("linear", 2, dict(aggregation="ssc", carry="independent")),
    slow("linear", 2, dict(aggregation="grm", read_buffer=1)),
  ],
)
def test_values_of_another_width_than_keys(rule, value_dim, options):
  rule = build(rule)
  x = samples.inputs(rule, length=LENGTH, value_dim=value_dim)
  expected = run(x, rule, **{name: option for name, option in options.items() if name != "read_buffer"})
  assert_same(run(x, rule, dict(data=1, context=4), **options), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("gate", [slow("sigmoid"), "token"])
def test_gates(gate):
  rule = build("linear")
  x = samples.inputs(rule, length=LENGTH, ages=LENGTH // SEGMENT)
  options = dict(aggregation="grm", gate=gate, pool="sum", segment_ids=SEGMENT_IDS)
  assert_same(run(x, rule, MESHES[0], **options), run(x, rule, **options))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
  ("to_states", "segment", "read_buffer"),  # segment: two memories on each device, which are halved, and one
  [
    (False, 4, 1),
    slow(False, 4, 1 << 20),
    slow(False, 8, 1),
    slow(False, 8, 1 << 20),
    slow(True, 4, 1),
    slow(True, 4, 1 << 20),
    slow(True, 8, 1),
    slow(True, 8, 1 << 20),
  ],
)
def test_both_ways_of_reading(monkeypatch, to_states, segment, read_buffer):
  monkeypatch.setattr(reading, "traffic", lambda *_: (int(to_states), 0 if to_states else 1))
  rule = build("dla")
  x = samples.inputs(rule, length=LENGTH)
  options = dict(segment=segment, carry="independent", segment_ids=SEGMENT_IDS)
  desired = run(x, rule, **options)
  assert_same(run(x, rule, MESHES[0], read_buffer=read_buffer, **options), desired)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("to_states", [slow(False), True])
def test_an_odd_number_of_parts(monkeypatch, to_states):
  monkeypatch.setattr(reading, "traffic", lambda *_: (int(to_states), 0 if to_states else 1))
  rule = build("linear")
  x = samples.inputs(rule, length=24)
  options = dict(segment_ids=SEGMENT_IDS[:, :24])
  assert_same(run(x, rule, dict(data=1, context=3), **options), run(x, rule, **options))


@pytest.mark.parametrize("count", range(2, 9))
def test_every_part_reads_the_same(count):
  """A half of a part reads as many memories as there are before it; early and late halves make one sum."""
  halves = context.Parts(count, "context", 1).halves()
  assert sorted(halves.reshape(-1)) == list(range(2 * count))
  assert set(halves.sum(1)) == {2 * count - 1}


def test_the_cheaper_way_of_reading():
  """Small states go to many queries, and few queries to large states."""

  def moves(segment, width):
    rows, length, n, parts = 2, 4096, 4096 // segment // 4, context.Parts(4, "context", 1 << 28)
    x = jax.ShapeDtypeStruct((1, rows, length // 4, width), jnp.bfloat16)
    memories = {"w": jax.ShapeDtypeStruct((n, 1, rows, width, width), jnp.float32)}
    return reading.traffic(parts, memory.aggregate.ReadLayer("w"), x, memories)

  to_queries, to_states = moves(segment=512, width=64)
  assert to_queries < to_states
  to_queries, to_states = moves(segment=16, width=256)
  assert to_states < to_queries


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("read_buffer", [1, 1 << 20])
def test_selected_in_as_many_rounds_as_it_takes(monkeypatch, read_buffer):
  """Room for 8 queries at a time, and room for all: nothing is dropped."""
  if read_buffer > 1:
    monkeypatch.setattr(selecting, "_SPARE", 100.0)
  rule = build("titans")
  x = samples.inputs(rule, length=128)
  options = dict(aggregation="ssc", top_k=3, carry="independent")
  assert_same(run(x, rule, MESHES[0], read_buffer=read_buffer, **options), run(x, rule, **options))


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("batch", "heads"), [slow(1, 4), slow(4, 1), (3, 2)])
def test_groups_of_rows_and_heads_that_pass_through_the_devices(batch, heads):
  rule = build("titans")
  x = samples.inputs(rule, batch=batch, heads=heads, length=LENGTH)
  options = dict(aggregation="none", segment_ids=SEGMENT_IDS[:batch])
  assert_same(run(x, rule, dict(data=1, context=4), **options), run(x, rule, **options))


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_windows_reach_over_borders():
  rule = build("swla", window=4)
  x = samples.inputs(rule, length=LENGTH)
  options = dict(aggregation="none", segment_ids=SEGMENT_IDS)
  assert_same(run(x, rule, dict(data=1, context=8), **options), run(x, rule, **options))


@pytest.mark.parametrize(
  ("aggregation", "carry"), [slow("grm", "checkpoint"), ("ssc", "independent"), slow("soup", "checkpoint")]
)
def test_no_token_sees_its_future(aggregation, carry):
  rule = build("dla")
  x = jax.tree.map(jnp.float32, samples.inputs(rule, batch=2, length=LENGTH))
  options = dict(rule=rule, segmentation=memory.segments.constant(SEGMENT), implementation="xla")

  @samples.jit
  def call(x):
    return on_mesh(*x[:6], aggregation=aggregation, carry=carry, **options)

  with jax.set_mesh(on(MESHES[0])):
    before = jax.device_get(call(x))
    for t in (7, 8, 21):
      changed = samples.map_tokens(lambda a, t=t: a.at[:, t].set(0.5), x)
      after = jax.device_get(call(changed))
      np.testing.assert_array_equal(after[:, :t], before[:, :t])
      assert not np.array_equal(after[:, t], before[:, t])


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "aggregation"), [("titans", "grm"), ("swla", "ssc")])
def test_kernels_across_devices(rule, aggregation):
  """As kernels, interpreted: each device runs them on its own segments."""
  rule = build(rule, chunk=8)
  x = jax.tree.map(np.float32, samples.inputs(rule, batch=1, heads=1, length=64, head_dim=8))
  options = dict(segment=16, aggregation=aggregation)
  actual = run(x, rule, dict(data=1, context=2), implementation="pallas", **options)
  assert_same(actual, run(x, rule, **options), tolerance=2e-5)


def test_an_overflow_stays_in_its_document():
  """Document 1 overflows on the first device, document 2 begins there and goes on over three more."""
  rule = build("linear")
  x = jax.tree.map(np.float32, samples.inputs(rule, batch=1, length=16))
  x.v[:, :3], x.k[:, :3] = 3e38, 1.0
  ids = np.array([[1] * 5 + [2] * 11])
  options = dict(segment=2, aggregation="none", segment_ids=ids)
  one, many = (run(x, rule, axes, **options)[1] for axes in (None, dict(data=1, context=4)))
  assert not np.isfinite(many[:, :5]).all()
  assert_same(many[:, 5:], one[:, 5:], tolerance=1e-5)


@pytest.mark.usefixtures("float64")
def test_a_memory_may_forget_everything():
  """A retention of 0, whose logarithm has no gradient."""
  rule = build("swla")
  x = samples.inputs(rule, batch=1, length=16)
  x.gates["alpha"][:, 3] = 0.0
  options = dict(segment=2, aggregation="none")
  assert_same(run(x, rule, MESHES[0], **options), run(x, rule, **options))


def test_a_token_that_is_no_number_changes_no_other():
  rule = build("linear")
  x = samples.inputs(rule, batch=1, heads=1, length=LENGTH)
  options = dict(aggregation="ssc", top_k=7, carry="independent")
  before = run(x, rule, dict(data=1, context=8), **options)[1]
  x.u[:, 11] = np.nan
  after = run(x, rule, dict(data=1, context=8), **options)[1]
  assert np.flatnonzero((before != after).any((0, 2, 3))).tolist() == [11]


@pytest.mark.parametrize("to_states", [slow(False), True])
def test_rounded_gradients_of_many_steps(monkeypatch, to_states):
  """Steps of a read are added up in float32: as far from it as one device's."""
  monkeypatch.setattr(reading, "traffic", lambda *_: (int(to_states), 0 if to_states else 1))
  rule = build("linear", chunk=16)
  x = jax.tree.map(np.float32, samples.inputs(rule, batch=1, heads=1, length=1024, head_dim=8))
  rounded = samples.map_tokens(lambda a: a.astype(jnp.bfloat16), x)._replace(gates=x.gates)
  options = dict(segment=16, aggregation="residual")
  exact, one = run(x, rule, **options)[0], run(rounded, rule, **options)[0]
  many = run(rounded, rule, dict(data=1, context=4), read_buffer=1, **options)[0]

  def error(x, name):
    a, b = np.float32(getattr(x, name)), getattr(exact, name)
    return np.abs(a - b).max() / np.abs(b).max()

  for name in ("q", "k", "v"):
    assert error(many, name) < 1.5 * error(one, name) + 1e-3, name


def kept_bytes(rule, aggregation, carry, count):
  """Bytes that a device keeps for the backward pass, M_0 apart."""
  x = jax.tree.map(np.float32, samples.inputs(rule, batch=1, heads=2, length=256, head_dim=8))
  options = dict(rule=rule, aggregation=aggregation, carry=carry, implementation="xla")

  def call(arrays):
    return on_mesh(*arrays, x.init, segmentation=memory.segments.constant(8), **options)

  with jax.set_mesh(on(dict(data=1, context=count))):
    _, pull = samples.jit(lambda arrays: jax.vjp(call, arrays))(tuple(x[:5]))
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(pull))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("rule", "aggregation", "carry"),
  [("linear", "grm", "checkpoint"), slow("titans", "grm", "independent"), slow("titans", "none", "checkpoint")],
)
def test_what_is_kept_for_the_backward_pass_is_shared_out(rule, aggregation, carry):
  whole = kept_bytes(build(rule), aggregation, carry, 1)
  for count in (2, 4, 8):
    share = kept_bytes(build(rule), aggregation, carry, count) / whole
    # The states that arrive from other devices (one a row and head) and the summaries of all segments come on top.
    # A pipeline of devices keeps nothing but those states, and does the rest again.
    assert 0.1 / count < share < 1.35 / count, f"{share * count:.2f} times a {count}th"


def gathered(jaxpr):
  """Bytes of everything that an equation gathers, in a jaxpr and all inside it."""
  for equation in jaxpr.eqns:
    if equation.primitive.name in ("all_gather", "all_to_all"):
      yield from (v.aval.size * v.aval.dtype.itemsize for v in equation.outvars)
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
    ):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from gathered(inner)


@pytest.mark.parametrize("to_states", [False, True])
def test_what_a_read_gathers_fits_the_buffer(monkeypatch, to_states):
  monkeypatch.setattr(reading, "traffic", lambda *_: (int(to_states), 0 if to_states else 1))
  rule = build("dla")
  x = jax.tree.map(np.float32, samples.inputs(rule, batch=1, length=256, head_dim=16))
  call = functools.partial(
    on_mesh, rule=rule, gate="constant", carry="independent", segmentation=memory.segments.constant(8)
  )
  most = {}
  for read_buffer in (1 << 16, 1 << 24):
    with jax.set_mesh(on(dict(data=1, context=4))):
      loss = lambda *arrays: call(*arrays, read_buffer=read_buffer, implementation="xla").sum()  # noqa: E731
      most[read_buffer] = max(gathered(jax.make_jaxpr(jax.grad(loss))(*x[:6]).jaxpr))
  assert most[1 << 16] <= 1 << 16 < most[1 << 24]


@pytest.mark.slow
def test_rounded_inputs():
  """bfloat16: as far from float32 as one device's."""
  rule = build("titans")
  x = jax.tree.map(np.float32, samples.inputs(rule, length=LENGTH))
  rounded = samples.map_tokens(lambda a: a.astype(jnp.bfloat16), x)
  rounded = rounded._replace(gates=x.gates)
  exact, one, many = run(x, rule)[1], run(rounded, rule)[1], run(rounded, rule, MESHES[0])[1]
  assert many.dtype == jnp.bfloat16
  error = lambda y: np.abs(np.float32(y) - exact).max()  # noqa: E731
  assert error(many) < 1.5 * error(one)


@pytest.mark.parametrize(
  ("axes", "options", "message"),
  [
    (dict(data=8), {}, "batch=4 must be a multiple of the mesh's data x fsdp = 8"),
    (dict(data=1, model=4), {}, "heads=2 must be a multiple of the mesh's model=4"),
    (dict(data=1, context=4), dict(segment=16), "2 segments, the first of 16 tokens, the last of 16: the mesh's cont"),
    (dict(data=1, context=4), dict(segment=5), "context=4 needs segments of one length"),
    (dict(data=2), dict(implementation="reference"), "implementation='reference' runs on one device"),
    (dict(data=2), dict(aggregation="all"), "aggregation must be one of"),
  ],
)
def test_what_does_not_fit_the_mesh(axes, options, message):
  rule = build("linear")
  with pytest.raises(ValueError, match=message):
    run(samples.inputs(rule, length=LENGTH), rule, axes, **options)


def test_without_a_mesh():
  rule = build("linear")
  x = samples.inputs(rule, length=LENGTH)
  options = dict(rule=rule, segmentation=memory.segments.constant(SEGMENT))
  chex.assert_trees_all_equal(on_mesh(*x[:6], **options), memory.memory_caching(*x[:6], **options))
