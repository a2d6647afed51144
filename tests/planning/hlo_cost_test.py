"""Costs of compiled programs: loops multiply, slices are charged as slices, kernels by their estimates."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from marks import slow

from mc_jax.parallel import chips
from mc_jax.planning import hlo, hlo_cost, topology

# What is compiled for a TPU that is not there can be put into the cache, but not taken out of it.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")

TPU, CPU = "v5e:2x2", "cpu"
WIDTH = 2048
PRODUCT = 2 * WIDTH**3


def cost(fn, *args, on=TPU, **options):
  """The cost of fn, compiled for shapes (dtype, *dims)."""
  return hlo_cost.cost(compiled(fn, *args, on=on), **options)


def compiled(fn, *args, on=TPU):
  if on != CPU:
    pytest.importorskip("libtpu")
  sharding = topology.one_chip(on) if on != CPU else None
  structs = [jax.ShapeDtypeStruct(dims, dtype, sharding=sharding) for dtype, *dims in args]
  return jax.jit(fn).lower(*structs).compile()


def products(x, ws):
  return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]


def stacked(n, dtype="bfloat16"):  # of which XLA:TPU makes no copies for the matrix unit
  return (dtype, WIDTH, WIDTH), (dtype, n, WIDTH, WIDTH)


@pytest.mark.parametrize("on", [TPU, CPU])
def test_without_loops_agrees_with_xla(on):
  def f(x, a, b):
    return jnp.maximum(x @ a, 0) @ b

  program = compiled(f, *[("float32", WIDTH, WIDTH)] * 3, on=on)
  ours, xla = hlo_cost.cost(program), program.cost_analysis()
  assert ours.flops == 2 * PRODUCT
  assert ours.flops == pytest.approx(xla["flops"], rel=0.01)
  if on == CPU:  # XLA:TPU counts arrays in VMEM too
    assert ours.hbm_bytes == pytest.approx(xla["bytes accessed"], rel=0.01)


@pytest.mark.parametrize("on", [TPU, CPU])
def test_a_scan_multiplies(on):
  few, many = (cost(products, *stacked(n), on=on) for n in (24, 34))  # too many for VMEM
  assert few.flops == 24 * PRODUCT
  assert many.flops == 34 * PRODUCT
  # Each step reads its own matrix and no more of the stack. XLA:CPU makes it float32 first, and keeps x in memory.
  per_step = (many.hbm_bytes - few.hbm_bytes) / 10
  matrix = 2 * WIDTH**2
  assert per_step == pytest.approx(matrix, rel=0.01) if on == TPU else 6 * matrix < per_step < 20 * matrix
  assert not many.unknown_loops


@pytest.mark.parametrize("on", [slow(TPU), CPU])
def test_nested_scans_multiply(on):
  def f(x, ws):
    return jax.lax.scan(lambda x, _: (products(x, ws), None), x, None, length=5)[0]

  assert cost(f, *stacked(3), on=on).flops == 15 * PRODUCT


@pytest.mark.slow
def test_a_gradient_through_layers():
  """Forward one product a layer, backward two, and what the scan stacks is written once and read once."""

  def loss(x, ws):
    layer = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    return jax.lax.scan(layer, x, ws)[0].sum()

  few, many = (cost(jax.grad(loss, argnums=1), *stacked(n)) for n in (24, 34))
  assert many.flops - few.flops == 3 * 10 * PRODUCT
  array = 2 * WIDTH**2
  per_layer = (many.hbm_bytes - few.hbm_bytes) / 10
  assert 8 * array < per_layer < 18 * array  # one whole stack would be 34


@pytest.mark.parametrize(("bounds", "trips"), [slow((0, 7), 7), ((3, 8), 5), slow((5, 5), 0)])
def test_bounds_and_steps_are_followed(bounds, trips):
  def f(x, ws):
    del ws
    return jax.lax.fori_loop(*bounds, lambda _, x: x @ x, x)

  assert cost(f, *stacked(1)).flops == trips * PRODUCT


def test_a_loop_that_counts_by_doubling():
  def f(x):
    return jax.lax.while_loop(lambda s: s[0] < 100, lambda s: (s[0] * 2, s[1] @ s[1]), (1, x))[1]

  result = cost(f, ("float32", WIDTH, WIDTH))
  assert result.flops == 7 * PRODUCT  # 1, 2, 4, ..., 64
  assert not result.unknown_loops


@pytest.mark.parametrize("on", [slow(TPU), CPU])
def test_a_traced_bound_is_unknown(on):
  def f(x, n):
    return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

  args = ("float32", WIDTH, WIDTH), ("int32",)
  result = cost(f, *args, on=on)
  assert len(result.unknown_loops) == 1
  assert "while" in result.unknown_loops[0]
  assert result.flops == PRODUCT
  assert cost(f, *args, on=on, unknown_trips=2.5).flops == 2.5 * PRODUCT


@pytest.mark.parametrize("on", [TPU, slow(CPU)])
def test_an_inner_bound_that_the_outer_loop_changes_is_unknown(on):
  def f(x):
    def outer(i, x):
      return jax.lax.fori_loop(0, i, lambda _, x: x @ x, x)

    return jax.lax.fori_loop(0, 4, outer, x)

  result = cost(f, ("float32", WIDTH, WIDTH), on=on)
  assert len(result.unknown_loops) == 1
  assert result.flops == 4 * PRODUCT


def test_the_costlier_branch():
  def f(p, x, w):
    return jax.lax.cond(p, lambda: x @ w @ w, lambda: x @ w)

  assert cost(f, ("bool",), *[("float32", WIDTH, WIDTH)] * 2).flops == 2 * PRODUCT


def test_an_update_in_place_is_charged_the_update():
  def f(stack, i):
    return jax.lax.fori_loop(0, 64, lambda j, s: s.at[j].add(i), stack)

  stack = ("float32", 64, WIDTH, 512)  # 256 MiB: not in VMEM
  size = 4 * 64 * WIDTH * 512
  assert cost(f, stack, ("float32",)).hbm_bytes < 5 * size  # 64 whole stacks, if it were not


def test_a_scatter_in_place_is_charged_what_is_new():
  def f(stack, new, at):
    return jax.lax.fori_loop(0, 64, lambda j, s: s.at[j, at].set(new * s[0, 0, 0], mode="drop"), stack)

  stack = ("float32", 64, WIDTH, 512)  # 256 MiB: not in VMEM
  assert cost(f, stack, ("float32", 8, 512), ("int32", 8)).hbm_bytes < 5 * 4 * 64 * WIDTH * 512


def test_a_reduction_to_a_pair():
  x = ("float32", 64, WIDTH, 512)
  assert cost(lambda x: jnp.argmax(x, -1), x).hbm_bytes == pytest.approx(4 * 64 * WIDTH * (512 + 1), rel=0.01)


@pytest.mark.parametrize("dtype", [slow("float32"), "bfloat16"])
def test_batched_products(dtype):
  """XLA:TPU makes them strided convolutions, most positions of whose window fall into holes."""

  def f(x, y):
    return jnp.einsum("bhij,bhjk->bhik", x, y)

  shape = (dtype, 4, 8, 256, 128), (dtype, 4, 8, 128, 512)
  assert cost(f, *shape).flops == 2 * 4 * 8 * 256 * 128 * 512


def test_a_convolution():
  def f(x, w):
    return jax.lax.conv_general_dilated(x, w, (1,), [(3, 0)], dimension_numbers=("NWC", "WIO", "NWC"))

  result = cost(f, ("float32", 8, 1024, 256), ("float32", 4, 256, 512), on=CPU)
  assert result.flops == 2 * 8 * 256 * 512 * (4 * 1024 - 6)  # six of the window's places fall into padding


def test_padded_layouts_count_in_full():
  program = compiled(lambda x: 2 * x, ("float32", 1 << 16, 5, 130))  # tiles of 8 x 128: 8 x 256
  moved = hlo_cost.cost(program).hbm_bytes
  assert moved == 2 * program.memory_analysis().argument_size_in_bytes
  assert moved > 2 * 4 * (1 << 16) * 5 * 130


def test_a_kernel_is_worth_its_estimate_times_its_calls():
  estimate = pl.CostEstimate(flops=12_345, bytes_accessed=67_890, transcendentals=0)

  def double(x_ref, y_ref):
    y_ref[...] = 2 * x_ref[...]

  def f(x, estimate=estimate):
    def body(x, _):
      block = pl.BlockSpec((256, WIDTH), lambda i: (i, 0))
      grid = (WIDTH // 256,)
      call = pl.pallas_call(
        double, grid=grid, in_specs=[block], out_specs=block, out_shape=x, name="double", cost_estimate=estimate
      )
      return call(x), None

    return jax.lax.scan(body, x, None, length=6)[0]

  result = cost(f, ("float32", WIDTH, WIDTH))
  assert result.kernels == {"double": hlo_cost.Kernel(6, 6 * 12_345, 6 * 67_890)}
  assert result.flops == 6 * 12_345
  assert not result.unestimated_kernels

  result = cost(lambda x: f(x, None), ("float32", WIDTH, WIDTH))
  assert result.unestimated_kernels == ("double",)
  assert result.kernels["double"].calls == 6


def test_a_kernel_keeps_its_name_under_transformations():
  def double(x_ref, y_ref):
    y_ref[...] = 2 * x_ref[...]

  @jax.custom_vjp
  def f(x):
    return pl.pallas_call(double, out_shape=x, name="forward")(x)

  def backward(_, d_y):
    return (pl.pallas_call(double, out_shape=d_y, name="backward")(d_y),)

  f.defvjp(lambda x: (f(x), None), backward)
  result = cost(jax.grad(lambda x: jnp.square(f(x)).sum()), ("float32", 256, 256))
  assert result.kernels.keys() == {"forward", "backward"}


def test_collectives_are_counted_apart():
  pytest.importorskip("libtpu")
  mesh = topology.mesh(TPU, {"x": 4})
  split = jax.sharding.NamedSharding(mesh, jax.P(None, "x"))

  def f(x, y):
    return jax.lax.with_sharding_constraint(x @ y, jax.sharding.NamedSharding(mesh, jax.P(None, None)))

  x = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32, sharding=split)
  y = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, jax.P("x", None)))
  result = hlo_cost.cost(jax.jit(f).lower(x, y).compile())
  assert result.flops == PRODUCT / 4
  assert result.collective_bytes == {"all-reduce": 2 * 3 / 4 * 4 * WIDTH**2}


@pytest.mark.slow
def test_what_a_collective_cut_into_pieces_sends_counts_once():
  """Weights split along one axis are gathered for each product, forward and backward, beside other products."""
  pytest.importorskip("libtpu")
  mesh = topology.mesh(TPU, {"data": 2, "model": 2})
  layers, width, hidden = 3, 1024, 4096

  def on(*axes):
    return jax.sharding.NamedSharding(mesh, jax.P(*axes))

  def loss(ws, x):
    @jax.checkpoint
    def layer(x, ws):
      y = jnp.tanh(x @ ws[0]) @ ws[1]
      return x + jax.lax.with_sharding_constraint(y, on("data")), None

    return jnp.square(jax.lax.scan(layer, x, ws)[0].astype(jnp.float32)).mean()

  ws = (
    jax.ShapeDtypeStruct((layers, width, hidden), jnp.bfloat16, sharding=on(None, "data", "model")),
    jax.ShapeDtypeStruct((layers, hidden, width), jnp.bfloat16, sharding=on(None, "model", "data")),
  )
  x = jax.ShapeDtypeStruct((4096, width), jnp.bfloat16, sharding=on("data"))
  program = jax.jit(jax.grad(loss)).lower(ws, x).compile()
  assert "AsyncCollectiveStart" in program.as_text()
  result = hlo_cost.cost(program, devices=list(mesh.devices.flat))
  gathered = 2 * width * hidden / 2  # bytes of one chip's share of a weight along "model"
  assert result.collective_bytes["all-gather"] == layers * 4 * gathered / 2
  time = result.time
  assert time.beside > 0
  assert time.waited > 0
  assert time.step == max(time.compute, time.beside) + time.waited < time.unhidden


@pytest.mark.parametrize(
  ("groups", "first"),
  [
    ("replica_groups={{0,2},{1,3}}", [0, 2]),
    ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
    ("replica_groups=mesh['x'=2,'y'=4] {'x'}", [0, 4]),
    ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", [0, 1, 2, 3, 4, 5, 6, 7]),
    ("replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}", [0, 1]),
    ("replica_groups=mesh['x'=2,'y'=4] {'y':(1)2}", [0, 2]),
    ("source_target_pairs={{0,1},{1,2},{2,0}}", [0, 1]),
    ("channel_id=1", []),
  ],
)
def test_groups_of_collectives(groups, first):
  op = hlo.instruction("x", f"f32[8]{{0}} all-reduce(%y), {groups}, use_global_device_ids=true")
  assert sorted(hlo.group(op)) == first


def test_times_are_the_compilers_and_no_shorter_than_the_peak():
  devices = list(topology.one_chip(TPU).mesh.devices.flat)
  chip = chips.of(devices)
  program = compiled(products, *stacked(24))
  time = hlo_cost.cost(program, devices=devices).time
  assert time.compute == pytest.approx(sum(time.classes.values()))
  assert 1 < time.classes["matrix products"] / (24 * PRODUCT / chip.flops) < 1.3
  assert hlo_cost.cost(program).time is None


def test_a_kernels_time_is_its_flops_at_its_rate():
  devices = list(topology.one_chip(TPU).mesh.devices.flat)
  chip = chips.of(devices)

  def double(x_ref, y_ref):
    y_ref[...] = 2 * x_ref[...]

  def f(x, flops):
    estimate = pl.CostEstimate(flops=flops, bytes_accessed=819_000, transcendentals=0)
    return pl.pallas_call(double, out_shape=x, name="titans_write_fwd", cost_estimate=estimate)(x)

  def seconds(flops):
    program = compiled(lambda x: f(x, flops), ("float32", 256, 256))
    return hlo_cost.cost(program, devices=devices).time.classes["titans_write_fwd"]

  assert seconds(10**12) == pytest.approx(1e12 / chips.kernel_rate("titans_write_fwd", chip) / chip.flops)
  assert seconds(1) == pytest.approx(1e-6)
