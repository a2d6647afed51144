"""Settings that every test shares, in place before jax starts; a text and a model so small that a run takes seconds."""

import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for `import quick_compile`
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from mc_jax.data import DataConfig
from mc_jax.models import MemoryConfig, ModelConfig
from mc_jax.parallel import mesh as meshes
from mc_jax.parallel.mesh import MeshConfig
from mc_jax.training.config import Config, TrainConfig
from mc_jax.training.optimizer import OptimizerConfig

# Meshes of up to 8 devices can be made in every test; what names no mesh runs on the first of them, as before.
jax.config.update("jax_num_cpu_devices", 8)
# Compiling dominates the tests: keep what was compiled from one run to the next (git-ignored).
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """What one file compiled is of no use to the next, and gigabytes in all."""
  yield
  jax.clear_caches()


@pytest.fixture
def float64():
  """The test runs in float64."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
  """A folder of 12 small files."""
  folder = tmp_path_factory.mktemp("texts")
  words = random.Random(0)
  for i in range(12):
    text = " ".join(words.choice(["memory", "segment", "chunk", "gate"]) for _ in range(60))
    (folder / f"{i}.txt").write_text(text)
  return folder


@pytest.fixture(scope="session")
def tiny(texts):
  """Makes a Config: tiny(**fields) sets fields by their last name, such as steps or pattern."""

  def make(**fields):
    parts = {
      "data": DataConfig(
        source="text",
        paths=str(texts),
        length=16,
        batch_size=4,
        validation_fraction=0.3,
        validation_tokens=128,
      ),
      "model": ModelConfig(
        layers=1,
        d_model=16,
        heads=2,
        mlp_dim=16,
        remat="none",
        memory=MemoryConfig(rule="linear", chunk=4, segment_length=8),
      ),
      "optimizer": OptimizerConfig(warmup_steps=2),
      "train": TrainConfig(steps=6, log_every=1, eval_every=3, checkpoint_every=3, sample_length=0),
      "mesh": MeshConfig(),
    }
    for name, part in parts.items():
      own = {field.name for field in dataclasses.fields(part)} & set(fields)
      parts[name] = dataclasses.replace(part, **{field: fields.pop(field) for field in own})
    assert not fields, fields
    return Config(**parts)

  return make


@pytest.fixture(scope="session")
def alone():
  """The mesh of one device."""
  return meshes.make(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="session")
def door(tmp_path_factory):
  """Runs a door or a program's path: door("generate", *flags, folder=., words="") -> CompletedProcess; see doors.py."""
  here, root = pathlib.Path(__file__).parent, pathlib.Path(__file__).parent.parent
  printed = [tmp_path_factory.mktemp("doors") / name for name in ("out", "err")]
  server = subprocess.Popen(
    [sys.executable, str(here / "doors.py")],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=root,
    env=os.environ | {"PYTHONPATH": str(root)},
  )

  def run(name, *flags, folder=root, words=""):
    module = str(name) if isinstance(name, pathlib.Path) else f"mc_jax.{name}"
    job = {"module": module, "arguments": list(map(str, flags)), "folder": str(folder), "input": words}
    job |= {"out": str(printed[0]), "err": str(printed[1]), "cache": str(root / ".jax_cache")}
    print(json.dumps(job), file=server.stdin, flush=True)
    status = int(server.stdout.readline())
    return subprocess.CompletedProcess(job["arguments"], status, *(path.read_text() for path in printed))

  yield run
  server.stdin.close()
  server.wait()
