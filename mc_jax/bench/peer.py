"""Measures the training speed of others' layers as mc_jax.bench.layer measures those of this project.

    python3 -m venv peer && peer/bin/pip install absl-py torch titans-pytorch==0.5.5 transformers
    peer/bin/python mc_jax/bench/peer.py --layer=titans
    peer/bin/python mc_jax/bench/peer.py --layer=gated_deltanet

titans is titans-pytorch's NeuralMemory; gated_deltanet is the layer of transformers' Qwen3-Next, which on a CPU takes
its chunked path, with values twice as wide as keys. Forward and backward of one layer, float32, d_model 256, 4 heads,
chunk 64, networks of two layers of expansion 4, 1,024 tokens: the median of 5 calls after a first one to warm up, in
tokens per second.
"""

import statistics
import time

import torch
from absl import app, flags

DIM, HEADS, LENGTH, CHUNK = 256, 4, 1024, 64


def titans():
  """titans-pytorch's layer."""
  from titans_pytorch import MemoryMLP, NeuralMemory

  model = MemoryMLP(DIM // HEADS, depth=2, expansion_factor=4.0)
  layer = NeuralMemory(DIM, chunk_size=CHUNK, heads=HEADS, dim_head=DIM // HEADS, model=model)
  return lambda x: layer(x)[0]


def gated_deltanet():
  """The layer of transformers' Qwen3-Next."""
  from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
  from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

  config = Qwen3NextConfig(
    hidden_size=DIM,
    linear_num_key_heads=HEADS,
    linear_num_value_heads=HEADS,
    linear_key_head_dim=DIM // HEADS,
    linear_value_head_dim=2 * DIM // HEADS,
  )
  return Qwen3NextGatedDeltaNet(config, layer_idx=0)


LAYERS = {"titans": titans, "gated_deltanet": gated_deltanet}
_LAYER = flags.DEFINE_enum("layer", "titans", list(LAYERS), "The layer to measure.")


def main(_) -> None:
  """Prints the layer's speed."""
  layer = LAYERS[_LAYER.value]()
  x = torch.randn(1, LENGTH, DIM, requires_grad=True)
  times = []
  for _ in range(6):
    begin = time.perf_counter()
    layer(x).square().mean().backward()
    times.append(time.perf_counter() - begin)
  speed = LENGTH / statistics.median(times[1:])
  print(f"{_LAYER.value}: {speed:,.0f} tokens/s, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
  app.run(main)
