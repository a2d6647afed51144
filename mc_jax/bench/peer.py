"""Measures the training speed of titans-pytorch's NeuralMemory as mc_jax.bench.layer measures a layer of this project.

    python3 -m venv peer && peer/bin/pip install torch titans-pytorch==0.5.5
    peer/bin/python -m mc_jax.bench.peer

Forward and backward of one layer, float32, d_model 256, 4 heads, chunk 64, two layers of expansion 4, 1,024 tokens: the
median of 5 calls after a first one to warm up, in tokens per second.
"""

import statistics
import time

import torch
from titans_pytorch import MemoryMLP, NeuralMemory

DIM, HEADS, LENGTH = 256, 4, 1024
model = MemoryMLP(DIM // HEADS, depth=2, expansion_factor=4.0)
layer = NeuralMemory(DIM, chunk_size=64, heads=HEADS, dim_head=DIM // HEADS, model=model)
x = torch.randn(1, LENGTH, DIM, requires_grad=True)
times = []
for _ in range(6):
  begin = time.perf_counter()
  layer(x)[0].square().mean().backward()
  times.append(time.perf_counter() - begin)
speed = LENGTH / statistics.median(times[1:])
print(f"{speed:,.0f} tokens/s, torch {torch.__version__}, {torch.get_num_threads()} threads")
