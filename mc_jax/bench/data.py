"""Measures the speed of the input pipeline: batches, tokenizing, and how long training steps wait for data.

  python -m mc_jax.bench.data --json=bench_data.json

batches: packed batches on a device, from ArrayRecord files of random ids with documents of log-normal lengths. prepare:
text of Python's standard library, tokenized by a BPE learned from it and written as ArrayRecord files by one process.
step: training steps of a small model, alternating between such batches and a constant one. Nothing else should run on
the machine. Rates per CPU second count the time of this process's threads.
"""

import contextlib
import dataclasses
import os
import platform
import statistics
import tempfile
import time

import mc_jax.xla_flags  # noqa: F401  isort: skip  (before jax)
import jax
import numpy as np
from absl import flags
from array_record.python import array_record_module
from etils import epath

from mc_jax import cli
from mc_jax.data import DataConfig, PackingConfig, datasets, formats, learning, manifests, preparation, tokenizers
from mc_jax.data.config import SourceConfig
from mc_jax.models import MemoryConfig, ModelConfig
from mc_jax.training import state as states
from mc_jax.training.config import Config
from mc_jax.training.step import lower

_MEASURE = flags.DEFINE_multi_enum(
  "measure", ["batches", "prepare", "step"], ["batches", "prepare", "step"], "What to measure."
)
_TOKENS = flags.DEFINE_integer("tokens", 20_000_000, "batches, step: Number of ids in the files.", lower_bound=100_000)
_LENGTH = flags.DEFINE_integer("length", 16_384, "batches: Tokens in a row.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 8, "batches: Rows in a batch.", lower_bound=1)
_METHODS = flags.DEFINE_list("methods", ["concat", "best_fit"], "batches: Packing methods.")
_WORKERS = cli.numbers_flag("workers", [0, 1, 2], "batches: Numbers of worker processes.", least=0)
_SECONDS = flags.DEFINE_float("seconds", 5.0, "batches: Duration in seconds, after a first batch.", lower_bound=0.1)
_VOCAB = flags.DEFINE_integer("vocab", 32_768, "Size of the tokenizer's vocabulary.", lower_bound=257)
_STEPS = flags.DEFINE_integer("steps", 1, "step: Steps in a turn, which ends when they have finished.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 40, "step: Turns of each kind.", lower_bound=2)
_STEP_WORKERS = flags.DEFINE_integer("step_workers", 0, "step: Number of worker processes.", lower_bound=0)
_JSON = cli.json_flag()

_DRAWS = 64  # batches that are timed without steps
_MEAN, _SIGMA = 6.3, 1.0  # of the logarithm of a document's length, whose mean is 900 tokens and whose median is 540


def corpus(folder: str) -> None:
  """Writes random ids to four files in the format of mc_jax.data.prepare."""
  rng = np.random.default_rng(0)
  sizes = np.exp(rng.normal(_MEAN, _SIGMA, _TOKENS.value // 900)).astype(int) + 1
  shards = []
  for number, lengths in enumerate(np.array_split(sizes, 4)):
    name = f"tokens-{number:05d}-of-00004.array_record"
    writer = array_record_module.ArrayRecordWriter(os.path.join(folder, name), "group_size:1,uncompressed")
    for size in lengths:
      writer.write(rng.integers(1, 256, size, np.uint16).tobytes())
    writer.close()
    shards.append(
      manifests.Shard(name, len(lengths), int(lengths.sum()), 0, os.path.getsize(os.path.join(folder, name)), 0)
    )
  fingerprint = tokenizers.Bytes.fingerprint
  manifests.write(epath.Path(folder), manifests.Manifest(fingerprint, "", 256, "<u2", (), tuple(shards)))


def data(folder: str, **fields) -> DataConfig:
  """The configuration of the data in `folder`."""
  return DataConfig(source="tokens", paths=folder, validation_fraction=0.01, **fields)


def batches(folder: str) -> list[dict]:
  """Tokens per second of packed batches, by packing method and number of workers."""
  rows = []
  for method in _METHODS.value:
    for workers in _WORKERS.value:
      packing = PackingConfig(method=method, align=16)
      config = data(folder, packing=packing, length=_LENGTH.value, batch_size=_BATCH.value, workers=workers)
      with contextlib.closing(datasets.load(config).batches(_mesh())) as drawn:
        jax.block_until_ready(next(drawn))
        count, begin, cpu = 0, time.perf_counter(), time.process_time()
        while (seconds := time.perf_counter() - begin) < _SECONDS.value:
          jax.block_until_ready(next(drawn))
          count += _BATCH.value * _LENGTH.value
        figures = {"tokens_per_second": count / seconds, "tokens_per_cpu_second": None}
        if not workers:
          figures["tokens_per_cpu_second"] = count / (time.process_time() - cpu)
        rows.append({"method": method, "workers": workers, **figures, "padding": drawn.padding})
        print(f"batches  {method:8}  {workers} workers  {count / seconds:13,.0f} tokens/s  {drawn.padding:.2%} padding")
  return rows


def _mesh() -> jax.sharding.Mesh:
  return Config().make_mesh(jax.devices()[:1])


def tokenizing(folder: str) -> dict:
  """Bytes of text per second that one process tokenizes and writes."""
  source, path = SourceConfig(source="stdlib"), epath.Path(folder) / "tokenizer.json"
  learning.train(source, _VOCAB.value, 10_000_000, path)
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  (blocks,) = preparation.divide(formats.blocks(source), 1)
  job = preparation.Job(blocks, folder, str(path), "", "<u2", "stop")
  begin, cpu = time.perf_counter(), time.process_time()
  shard = preparation.write("tokens-00000-of-00001.array_record", job)
  seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
  rates = {"bytes_per_second": shard.text_bytes / seconds, "bytes_per_cpu_second": shard.text_bytes / cpu}
  print("prepare  " + "  ".join(f"{rate / 1e6:.2f} MB per {name[10:]}" for name, rate in rates.items()))
  return {"vocab": tokenizers.load(str(path)).vocab_size, **rates, **dataclasses.asdict(shard)}


def steps(folder: str) -> dict:
  """Seconds of a training step on the loader's batches and on a constant one, in turns, and the median ratio."""
  memory = MemoryConfig(rule="linear", segment_length=128, chunk=64)
  model = ModelConfig(layers=2, d_model=128, heads=4, remat="none", memory=memory)
  packing = PackingConfig(method="best_fit", align=16)
  config = Config(
    data=data(folder, packing=packing, length=1024, batch_size=8, workers=_STEP_WORKERS.value), model=model
  ).check()
  mesh = _mesh()
  update = lower(config, mesh).compile()
  state = states.create(config, mesh)
  seconds = {"constant": [], "loader": []}
  with contextlib.closing(datasets.load(config.data).batches(mesh)) as drawn:
    constant = next(drawn)
    state, values = update(state, constant)
    jax.block_until_ready(values)
    for turn in range(2 * _TURNS.value):
      kind = ("constant", "loader", "loader", "constant")[turn % 4]
      begin = time.perf_counter()
      for _ in range(_STEPS.value):
        state, values = update(state, next(drawn) if kind == "loader" else constant)
      jax.block_until_ready(values)
      seconds[kind].append((time.perf_counter() - begin) / _STEPS.value)
    begin = time.perf_counter()
    for _ in range(_DRAWS):
      jax.block_until_ready(next(drawn))
    alone = (time.perf_counter() - begin) / _DRAWS
  medians = {kind: statistics.median(values) for kind, values in seconds.items()}
  pairs = zip(seconds["loader"], seconds["constant"], strict=True)  # other work is in both
  slower = statistics.median(loader / constant for loader, constant in pairs) - 1
  print("step     " + "  ".join(f"{kind} {1e3 * value:.1f} ms" for kind, value in medians.items()), end="")
  print(f"  {slower:+.1%}; a batch alone {1e3 * alone:.1f} ms")
  return {"seconds": seconds, "medians": medians, "slower": slower, "batch_alone": alone, "tokens": 8 * 1024}


def main(_: list[str]) -> None:
  """Measures what the flags name, and writes JSON if --json is given."""
  device = jax.devices()[0]
  print(f"{device.device_kind} ({device.platform}), {os.cpu_count()} cores, {platform.machine()}", flush=True)
  report = {"device": device.device_kind, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
  report |= {"command": cli.command("bench.data")}
  with tempfile.TemporaryDirectory() as folder:
    corpus(folder)
    measures = {"batches": batches, "prepare": tokenizing, "step": steps}
    for name in _MEASURE.value:
      with tempfile.TemporaryDirectory() as scratch:
        report[name] = measures[name](scratch if name == "prepare" else folder)
  cli.write_json(_JSON.value, report)


if __name__ == "__main__":
  cli.run(main)
