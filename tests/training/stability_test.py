"""What is told of the memories is what they hold, and telling it changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mc_jax.data import datasets
from mc_jax.memory.caching import Reads
from mc_jax.training import loop, metrics, stability, state

NORMS = {"memory_norm", "memory_norm_max"}


def _probed(config, mesh):
  params, batch = state.create(config, mesh).params, next(datasets.load(config.data).batches(mesh))
  return params, batch, jax.device_get(stability.probe(config, mesh)(params, batch))


def test_norms_are_those_of_what_was_written_and_equal_gates_have_the_largest_entropy(tiny, alone):
  memory = dataclasses.replace(tiny().model.memory, aggregation="grm", gate="uniform")
  config = tiny(memory=memory, layers=2)
  params, batch, found = _probed(config, alone)
  model = nnx.merge(state.graph(config), params)
  blocks, layers = nnx.split(model.blocks)
  x, ends = model.embed(batch["tokens"][:1]), []
  for layer in range(2):
    block = nnx.merge(blocks, jax.tree.map(lambda x, layer=layer: x[layer], layers))
    _, k, v, *_ = block.mixer.project(block.mixer_norm(x)).tokens
    k, v = np.asarray(k[0], np.float64), np.asarray(v[0], np.float64)
    ends += [np.einsum("lhi,lho->hio", k[:end], v[:end]) for end in (8, 16)]  # the linear rule sums
    x, _ = block(x)
  norms = np.sqrt(np.square(ends).sum(axis=(-2, -1)))
  assert set(found) == NORMS | {"gate_entropy"}
  assert found["memory_norm"] == pytest.approx(norms.mean(), rel=1e-4)
  assert found["memory_norm_max"] == pytest.approx(norms.max(), rel=1e-4)
  assert found["gate_entropy"] == pytest.approx(np.log(2), rel=1e-5)  # tokens of the second segment read two memories


def test_caches_that_nobody_selects_are_counted():
  """Two heads, four tokens, three caches, of which a token sees those before it."""
  visible = jnp.arange(3) < jnp.arange(4)[:, None]
  index = jnp.array([[0, 0, 0, 0], [0, 0, 1, 2]])[None, ..., None]
  kept = jnp.broadcast_to(visible.any(-1)[:, None], index.shape)
  reads = Reads(visible[None, None], None, None, index, kept)
  assert float(stability._never_selected(reads)) == pytest.approx(2 / 6)


@pytest.mark.slow
def test_a_run_that_is_looked_into_is_the_same_run(tiny, tmp_path):
  memory = dataclasses.replace(tiny().model.memory, rule="titans", aggregation="ssc", segment_length=4)
  config = tiny(memory=memory, documents=True)
  probed = dataclasses.replace(config, train=dataclasses.replace(config.train, probe_every=2))
  records = []
  for name, each in (("plain", config), ("probed", probed)):
    loop.train(each, tmp_path / name, devices=jax.devices()[:1])
    records.append(metrics.read(tmp_path / name))
  names = {*NORMS, "momentum_norm", "momentum_norm_max", "gate_entropy", "caches_never_selected"}
  for plain, looked_into in zip(*records, strict=True):
    assert plain["loss"] == looked_into["loss"]
    assert names & set(plain) == set()
    assert names & set(looked_into) == (names if plain["step"] % 2 == 0 else set())
