"""Our layers with the weights of Hugging Face's layers: pip install transformers einops torch.

Outputs, and gradients in the tokens and in every weight, all in float32. The norm of what memories answer has the
epsilon 1e-6 in ours, and theirs are told to have it: Mamba-2 and Kimi Linear were published with 1e-5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

from mc_jax.models import MemoryConfig, ModelConfig
from mc_jax.models.memory_caching import MemoryCaching

torch = pytest.importorskip("torch", reason="pip install transformers einops torch")
einops = pytest.importorskip("einops", reason="pip install transformers einops torch")
pytest.importorskip("transformers", reason="pip install transformers einops torch")

pytestmark = pytest.mark.slow

FLOAT32 = 5e-5  # most are below 5e-6; the gradient of an input gate's bias is what is left of larger numbers
D_MODEL, LENGTH = 16, 40
KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM = 2, 4, 8, 4


def modeling(name):
  return pytest.importorskip(f"transformers.models.{name}.modeling_{name}", reason="pip install -U transformers")


def linear(weight, **heads):
  """PyTorch's [outputs, inputs] as [inputs, heads, width]."""
  return einops.rearrange(weight, "(h d) i -> i h d", **heads)


def convolution(weight, **heads):
  """PyTorch's [channels, 1, width], the newest token last, as [width, heads, channels of one], the newest first."""
  return einops.rearrange(weight[..., ::-1], "(h d) 1 w -> w h d", **heads)


def output(weight):
  return einops.rearrange(weight, "o (h d) -> h d o", h=HEADS)


def qwen3_next():
  module = modeling("qwen3_next")
  config = module.Qwen3NextConfig(
    hidden_size=D_MODEL,
    num_hidden_layers=1,
    layer_types=["linear_attention"],
    linear_num_key_heads=KEY_HEADS,
    linear_num_value_heads=HEADS,
    linear_key_head_dim=KEY_DIM,
    linear_value_head_dim=VALUE_DIM,
    rms_norm_eps=1e-6,
  )

  def weights(w):
    shared = HEADS // KEY_HEADS * VALUE_DIM
    by_head = einops.rearrange(w["in_proj_qkvz.weight"], "(h d) i -> i h d", h=KEY_HEADS)
    q, k, v, z = jnp.split(by_head, np.cumsum([KEY_DIM, KEY_DIM, shared]), axis=-1)
    v, z = (einops.rearrange(y, "i k (r d) -> i (k r) d", d=VALUE_DIM) for y in (v, z))
    b, a = jnp.split(einops.rearrange(w["in_proj_ba.weight"], "(h d) i -> i h d", h=KEY_HEADS), 2, axis=-1)
    query, key, value = jnp.split(w["conv1d.weight"], np.cumsum([KEY_HEADS * KEY_DIM] * 2))
    return {
      "projection/kernel": jnp.stack([q, k], 1),
      "value_projection/kernel": jnp.stack([v, z], 1),
      "query_convolution/kernel": convolution(query, h=KEY_HEADS),
      "key_convolution/kernel": convolution(key, h=KEY_HEADS),
      "value_convolution/kernel": convolution(value, h=HEADS),
      "token_gates/eta/linear/kernel": b.reshape(D_MODEL, HEADS),
      "token_gates/alpha/linear/kernel": a.reshape(D_MODEL, HEADS),
      "token_gates/alpha/dt_bias": w["dt_bias"],
      "token_gates/alpha/log_rate": w["A_log"],
      "norm/scale": jnp.tile(w["norm.weight"], (HEADS, 1)),
      "output/kernel": output(w["out_proj.weight"]),
    }

  options = dict(rule="gated_deltanet", key_heads=KEY_HEADS, key_dim=KEY_DIM, expand_v=VALUE_DIM / KEY_DIM)
  return module.Qwen3NextGatedDeltaNet(config, layer_idx=0), weights, options


def mamba2():
  module = modeling("mamba2")
  inner, state = HEADS * VALUE_DIM, KEY_HEADS * KEY_DIM
  config = module.Mamba2Config(
    hidden_size=D_MODEL,
    num_hidden_layers=1,
    num_heads=HEADS,
    head_dim=VALUE_DIM,
    expand=inner // D_MODEL,
    n_groups=KEY_HEADS,
    state_size=KEY_DIM,
    chunk_size=10,
    layer_norm_epsilon=1e-6,
  )

  def weights(w):
    z, v, k, q, dt = jnp.split(w["in_proj.weight"], np.cumsum([inner, inner, state, state]))
    kernels, biases = (jnp.split(w[f"conv1d.{name}"], np.cumsum([inner, state])) for name in ("weight", "bias"))
    made = {
      "projection/kernel": jnp.stack([linear(q, h=KEY_HEADS), linear(k, h=KEY_HEADS)], 1),
      "value_projection/kernel": jnp.stack([linear(v, h=HEADS), linear(z, h=HEADS)], 1),
      "token_gates/alpha/linear/kernel": dt.T,
      "token_gates/alpha/dt_bias": w["dt_bias"],
      "token_gates/alpha/log_rate": w["A_log"],
      "skip": w["D"],
      "norm/scale": w["norm.weight"].reshape(HEADS, VALUE_DIM),
      "output/kernel": output(w["out_proj.weight"]),
    }
    heads = {"value": HEADS, "key": KEY_HEADS, "query": KEY_HEADS}
    for (name, h), kernel, bias in zip(heads.items(), kernels, biases, strict=True):
      made[f"{name}_convolution/kernel"] = convolution(kernel, h=h)
      made[f"{name}_convolution/bias"] = bias.reshape(h, -1)
    return made

  options = dict(rule="mamba2", key_heads=KEY_HEADS, key_dim=KEY_DIM, expand_v=VALUE_DIM / KEY_DIM)
  return module.Mamba2Mixer(config, layer_idx=0), weights, options


def kimi_linear():
  module = modeling("kimi_linear")
  config = module.KimiLinearConfig(
    hidden_size=D_MODEL,
    num_hidden_layers=1,
    layer_types=["linear_attention"],
    mlp_layer_types=["dense"],
    linear_num_heads=HEADS,
    linear_head_dim=KEY_DIM,
    rms_norm_eps=1e-6,
  )

  def weights(w):
    channels = {"h": HEADS}
    kernels = jnp.split(w["conv1d.weight"], 3)
    made = {
      "projection/kernel": jnp.stack([linear(w[f"{name}_proj.weight"], **channels) for name in "qkv"], 1),
      "token_gates/eta/linear/kernel": w["b_proj.weight"].T,
      "token_gates/channel_alpha/linear/down/kernel": w["forget_gate.f_a_proj.weight"].T,
      "token_gates/channel_alpha/linear/up/kernel": linear(w["forget_gate.f_b_proj.weight"], **channels),
      "token_gates/channel_alpha/dt_bias": w["forget_gate.dt_bias"].reshape(HEADS, KEY_DIM),
      "token_gates/channel_alpha/log_rate": w["forget_gate.A_log"].reshape(HEADS),
      "output_gate/down/kernel": w["g_a_proj.weight"].T,
      "output_gate/up/kernel": linear(w["g_b_proj.weight"], **channels),
      "output_gate/bias": jnp.zeros((HEADS, KEY_DIM)),  # fla's layer has one, this has not
      "norm/scale": jnp.tile(w["o_norm.weight"], (HEADS, 1)),
      "output/kernel": output(w["o_proj.weight"]),
    }
    for name, kernel in zip(("query", "key", "value"), kernels, strict=True):
      made[f"{name}_convolution/kernel"] = convolution(kernel, **channels)
    return made

  return module.KimiLinearDeltaAttention(config, layer_idx=0), weights, dict(rule="kda", key_dim=KEY_DIM)


def xlstm():
  """Their eps is added to the normaliser; we have none."""
  module = modeling("xlstm")
  config = module.xLSTMConfig(
    hidden_size=HEADS * KEY_DIM,
    num_hidden_layers=1,
    num_heads=HEADS,
    qk_dim_factor=0.5,
    mode="train",
    chunk_size=10,
    return_last_states=True,
    autocast_kernel_dtype="float32",
    eps=0.0,
  )

  def weights(w):
    q, k, v, z = (linear(w[f"{name}.weight"], h=HEADS) for name in ("q", "k", "v", "ogate_preact"))
    made = {
      "projection/kernel": jnp.stack([q, k], 1),
      "value_projection/kernel": jnp.stack([v, z], 1),
      "norm/scale": w["multihead_norm.weight"].reshape(HEADS, KEY_DIM),
      "output/kernel": output(w["out_proj.weight"]),
    }
    for name, theirs in (("alpha", "fgate_preact"), ("eta", "igate_preact")):
      made[f"token_gates/{name}/linear/kernel"] = w[f"{theirs}.weight"].T
      made[f"token_gates/{name}/bias"] = w[f"{theirs}.bias"]
    return made

  return module.xLSTMLayer(config), weights, dict(rule="mlstm", key_dim=KEY_DIM // 2)


def randomize(theirs):
  """Weights of all kinds that matter, decays between 0.3 and 1 a token most of all."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, w in theirs.named_parameters():
      scale = 0.5 if w.ndim == 1 else w[0].numel() ** -0.5
      w.copy_(torch.randn(w.shape, generator=generator) * scale)
      if name.endswith("A_log"):
        w.sub_(2)
      elif "norm" in name or name == "D":
        w.add_(1)


@pytest.mark.parametrize("layer", [qwen3_next, mamba2, kimi_linear, xlstm])
def test_a_layer_is_that_of_a_model_of_transformers(layer):
  theirs, weights, options = layer()
  randomize(theirs)
  d_model = next(iter(theirs.parameters())).shape[-1] if layer is xlstm else D_MODEL
  memory = MemoryConfig(**options, aggregation="none", chunk=oracles.CHUNK, segment_length=24)
  config = ModelConfig(vocab_size=16, layers=1, d_model=d_model, heads=HEADS, memory=memory)
  graph, params = nnx.split(MemoryCaching(config, rngs=nnx.Rngs(0)))

  @jax.jit
  def ours(w, x):
    made = {tuple(path.split("/")): array for path, array in weights(w).items()}
    flat = dict(nnx.to_flat_state(params))
    assert {path: array.shape for path, array in made.items()} == {path: array.shape for path, array in flat.items()}
    return nnx.merge(graph, nnx.from_flat_state({path: flat[path].replace(made[path]) for path in flat}))(x)[0]

  x = np.random.default_rng(0).normal(size=(2, LENGTH, d_model)).astype(np.float32)
  named = dict(theirs.named_parameters())
  y, pull = jax.vjp(ours, {name: jnp.asarray(w.detach().numpy()) for name, w in named.items()}, jnp.asarray(x))
  cotangent = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
  by_weight, by_x = pull(jnp.asarray(cotangent))

  given = torch.tensor(x, requires_grad=True)
  answer = theirs(given)
  answer = answer[0] if isinstance(answer, tuple) else answer
  gradients = torch.autograd.grad((answer * torch.tensor(cotangent)).sum(), (given, *named.values()))
  found = {"outputs": (y, answer), "x": (by_x, gradients[0])}
  found |= {name: (by_weight[name], g) for name, g in zip(named, gradients[1:], strict=True)}
  oracles.assert_close(layer.__name__, found, rtol=FLOAT32)
