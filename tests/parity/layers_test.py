"""Whole layers against those of transformers, with the same weights: without caches ours is the published layer.

pip install torch transformers
python -m pytest -n 0 -s tests/parity
"""

import jax
import numpy as np
import pytest
from flax import nnx

from mc_jax.models import MemoryConfig, ModelConfig
from mc_jax.models.memory_caching import MemoryCaching

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="the oracles are PyTorch's: pip install torch transformers")

BATCH, LENGTH, WIDTH, CHUNK = 2, 40, 32, 16


def ours(**options):
  config = ModelConfig(
    d_model=WIDTH,
    heads=options.pop("heads"),
    layers=1,
    memory=MemoryConfig(chunk=CHUNK, segment_length=CHUNK, aggregation="none", **options),
  )
  assert config.problems() == []
  return MemoryCaching(config, rngs=nnx.Rngs(0))


def put(parameter, tensor, *shape):
  """Sets a parameter to a tensor of PyTorch's, in this shape."""
  value = tensor.detach().numpy().reshape(shape)
  assert parameter[...].shape == value.shape
  parameter[...] = jax.numpy.asarray(value)


def put_convolution(layer, names, convolution, shapes):
  """Depthwise kernels, the latest token's number last in PyTorch and first here, of channels side by side."""
  first = 0
  for name, shape in zip(names, shapes, strict=True):
    size, ours = np.prod(shape), getattr(layer, f"{name}_convolution")
    kernel = convolution.weight[first : first + size, 0].flip(-1).T
    put(ours.kernel, kernel, len(kernel), *shape)
    if convolution.bias is not None:
      put(ours.bias, convolution.bias[first : first + size], *shape)
    first += size


def compare(name, layer, oracle):
  """Answers and the input's gradient, both of float32 layers."""
  rng = np.random.default_rng(0)
  x, cotangent = rng.normal(size=(2, BATCH, LENGTH, WIDTH)).astype(np.float32)
  tensor = torch.tensor(x, requires_grad=True)
  expected = oracle(tensor)
  expected = expected[0] if isinstance(expected, tuple) else expected
  expected.backward(torch.tensor(cotangent))
  graph, state = nnx.split(layer)
  y, pull = jax.vjp(lambda x: nnx.merge(graph, state)(x)[0], x)
  figures = [
    float(np.abs(a - b).max() / np.abs(b).max())
    for a, b in ((y, expected.detach().numpy()), (pull(cotangent)[0], tensor.grad.numpy()))
  ]
  print(f"| `{name}` | `{type(oracle).__name__}` | {figures[0]:.1e} | {figures[1]:.1e} |")
  assert max(figures) < 1e-5


def test_gated_deltanet_is_qwen3_nexts():
  module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next", reason="pip install transformers")
  keys, values, key_dim, value_dim = 2, 4, 8, 16
  config = module.Qwen3NextConfig(
    hidden_size=WIDTH,
    linear_num_key_heads=keys,
    linear_num_value_heads=values,
    linear_key_head_dim=key_dim,
    linear_value_head_dim=value_dim,
    rms_norm_eps=1e-6,
  )
  torch.manual_seed(0)
  oracle = module.Qwen3NextGatedDeltaNet(config, layer_idx=0)
  layer = ours(rule="gated_deltanet", heads=keys, key_dim=key_dim, value_heads=values)

  # Theirs has a group for each key head: its query and key, then the values and output gates of its value heads.
  shared = values // keys
  of_keys = oracle.in_proj_qkvz.weight.T.reshape(WIDTH, keys, -1)
  query, key, value, gate = of_keys.split([key_dim, key_dim, shared * value_dim, shared * value_dim], -1)
  put(layer.projection.kernel, torch.stack([query, key], 1), WIDTH, 2, keys, key_dim)
  put(layer.value_projection.kernel, torch.stack([value, gate], 1), WIDTH, 2, values, value_dim)
  step, decay = oracle.in_proj_ba.weight.T.reshape(WIDTH, keys, -1).split([shared, shared], -1)
  put(layer.token_gates.eta.linear.kernel, step, WIDTH, values)
  put(layer.token_gates.alpha.linear.kernel, decay, WIDTH, values)
  torch.nn.init.uniform_(oracle.dt_bias, -4, 0)
  torch.nn.init.uniform_(oracle.norm.weight, 0.5, 1.5)
  put(layer.token_gates.alpha.dt_bias, oracle.dt_bias, values)
  put(layer.token_gates.alpha.log_rate, oracle.A_log, values)
  put_convolution(
    layer, ("query", "key", "value"), oracle.conv1d, ((keys, key_dim), (keys, key_dim), (values, value_dim))
  )
  put(layer.norm.scale, oracle.norm.weight.expand(values, -1), values, value_dim)
  put(layer.output.kernel, oracle.out_proj.weight.T, values, value_dim, WIDTH)
  compare("gated_deltanet", layer, oracle)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_transformers(groups):
  module = pytest.importorskip("transformers.models.mamba2.modeling_mamba2", reason="pip install transformers")
  heads, head_dim, state = 4, 16, 8
  config = module.Mamba2Config(
    hidden_size=WIDTH,
    num_heads=heads,
    head_dim=head_dim,
    state_size=state,
    n_groups=groups,
    expand=2,
    chunk_size=CHUNK,
    layer_norm_epsilon=1e-6,
  )
  torch.manual_seed(0)
  oracle = module.Mamba2Mixer(config, layer_idx=0).eval()
  torch.nn.init.uniform_(oracle.D, 0.5, 1.5)
  torch.nn.init.uniform_(oracle.norm.weight, 0.5, 1.5)
  layer = ours(
    rule="mamba2", heads=heads, value_heads=heads, key_heads=groups, key_dim=state, expand_v=head_dim / state
  )

  inner = heads * head_dim
  gate, x, key, query, step = oracle.in_proj.weight.T.split([inner, inner, groups * state, groups * state, heads], -1)
  put(layer.projection.kernel, torch.stack([query, key], 1), WIDTH, 2, groups, state)
  put(layer.value_projection.kernel, torch.stack([x, gate], 1), WIDTH, 2, heads, head_dim)
  put_convolution(
    layer, ("value", "key", "query"), oracle.conv1d, ((heads, head_dim), (groups, state), (groups, state))
  )
  put(layer.token_gates.alpha.linear.kernel, step, WIDTH, heads)
  put(layer.token_gates.alpha.dt_bias, oracle.dt_bias, heads)
  put(layer.token_gates.alpha.log_rate, oracle.A_log, heads)
  put(layer.skip, oracle.D, heads)
  put(layer.norm.scale, oracle.norm.weight, heads, head_dim)
  put(layer.output.kernel, oracle.out_proj.weight.T, heads, head_dim, WIDTH)
  compare(f"mamba2, {groups} groups", layer, oracle)


def test_kda_is_kimi_linears():
  path = "transformers.models.kimi_linear.modeling_kimi_linear"
  module = pytest.importorskip(path, reason="pip install transformers, with Kimi Linear")
  heads, head_dim = 2, 16
  config = module.KimiLinearConfig(
    hidden_size=WIDTH, linear_num_heads=heads, linear_head_dim=head_dim, rms_norm_eps=1e-6
  )
  torch.manual_seed(0)
  oracle = module.KimiLinearDeltaAttention(config, layer_idx=0)
  torch.nn.init.uniform_(oracle.forget_gate.A_log, -1, 2)
  torch.nn.init.uniform_(oracle.forget_gate.dt_bias, -4, 0)
  torch.nn.init.uniform_(oracle.o_norm.weight, 0.5, 1.5)
  layer = ours(rule="kda", heads=heads, key_dim=head_dim)

  each = WIDTH, heads, head_dim
  maps = [linear.weight.T.reshape(each) for linear in (oracle.q_proj, oracle.k_proj, oracle.v_proj)]
  put(layer.projection.kernel, torch.stack(maps, 1), WIDTH, 3, heads, head_dim)
  put_convolution(layer, ("query", "key", "value"), oracle.conv1d, ((heads, head_dim),) * 3)
  put(layer.output_gate.down.kernel, oracle.g_a_proj.weight.T, WIDTH, head_dim)
  put(layer.output_gate.up.kernel, oracle.g_b_proj.weight.T, head_dim, heads, head_dim)
  decay = layer.token_gates.channel_alpha
  put(decay.linear.down.kernel, oracle.forget_gate.f_a_proj.weight.T, WIDTH, head_dim)
  put(decay.linear.up.kernel, oracle.forget_gate.f_b_proj.weight.T, head_dim, heads, head_dim)
  put(decay.dt_bias, oracle.forget_gate.dt_bias, heads, head_dim)
  put(decay.log_rate, oracle.forget_gate.A_log, heads)
  put(layer.token_gates.eta.linear.kernel, oracle.b_proj.weight.T, WIDTH, heads)
  put(layer.norm.scale, oracle.o_norm.weight.expand(heads, -1), heads, head_dim)
  put(layer.output.kernel, oracle.o_proj.weight.T, heads, head_dim, WIDTH)
  compare("kda", layer, oracle)
