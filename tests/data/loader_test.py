"""The same rows for any number of workers and hosts, wherever a run is killed and resumed."""

import dataclasses
import functools
import itertools
import json

import chex
import jax
import numpy as np
import pytest

from mc_jax.data import DataConfig, PackingConfig, PartConfig, datasets, loader, packing, streams, windows
from mc_jax.parallel import mesh as meshes
from mc_jax.parallel.mesh import MeshConfig

BATCH = 4


@pytest.fixture(scope="module")
def config(corpora):
  """Makes a configuration of two packed sources and a task."""

  def make(method="best_fit", **fields):
    parts = {
      "json": PartConfig(source="jsonl", paths=str(corpora["jsonl"]), weight=3.0),
      "records": PartConfig(source="arrayrecord", paths=str(corpora["arrayrecord"]), weight=2.0),
      "copies": PartConfig(source="copying", weight=1.0),
    }
    packing = PackingConfig(method=method, align=4, window=3)
    fields = {"validation_fraction": 0.2, "seed": 1} | fields
    return DataConfig(source="mixture", sources=parts, packing=packing, length=128, batch_size=BATCH, **fields)

  return make


@pytest.fixture(scope="module")
def dataset(config):
  return functools.cache(lambda method="best_fit", **fields: datasets.load(config(method, **fields)))


def _rows(dataset, rows=range(BATCH), workers=0):
  return loader.Rows(dataset.training, dataset.config.virtual_shards, BATCH, rows, workers)


def _take(rows, count):
  return list(itertools.islice(rows, count))


@pytest.mark.parametrize("method", ["concat", "best_fit"])
@pytest.mark.parametrize("shards", [0, 3, 8])
def test_a_killed_run_goes_on_with_the_same_rows_wherever_it_was(dataset, monkeypatch, method, shards):
  data = dataset(method, shards=shards)
  monkeypatch.delattr(streams.Packed, "skip")  # it goes there, it does not read all over again
  whole = _take(_rows(data), 12)
  for step in (1, 2, 5, 8):
    first = _rows(data)
    _take(first, step)
    second = _rows(data)
    second.seek(first.position, first.states)
    chex.assert_trees_all_equal(_take(second, 12 - step), whole[step:])


@pytest.mark.slow
def test_workers_change_nothing(dataset):
  data = dataset()
  whole, step = _take(_rows(data), 9), 4
  first = _rows(data, workers=2)
  chex.assert_trees_all_equal(_take(first, step), whole[:step])  # the workers are ahead by now
  second = _rows(data, workers=1)
  second.seek(first.position, first.states)
  first.close()
  chex.assert_trees_all_equal(_take(second, 2), whole[step : step + 2])
  third = _rows(data)
  third.seek(second.position, second.states)
  second.close()
  chex.assert_trees_all_equal(_take(third, 3), whole[step + 2 :])


@pytest.mark.parametrize("shards", [0, 2, 3])
def test_from_two_hosts_to_one_and_back(dataset, shards):
  data = dataset(shards=shards)
  whole, half = _take(_rows(data), 10), (range(BATCH // 2), range(BATCH // 2, BATCH))
  hosts = [_rows(data, rows) for rows in half]
  for batch in whole[:4]:
    chex.assert_trees_all_equal({k: v for host in hosts for k, v in next(host).items()}, batch)
  count = data.config.virtual_shards
  one = _rows(data)
  one.seek(hosts[0].position, loader.merge(loader.table(host.states, count) for host in hosts))
  chex.assert_trees_all_equal(_take(one, 3), whole[4:7])
  hosts = [_rows(data, rows) for rows in half]
  for host in hosts:
    host.seek(one.position, one.states)
  for batch in whole[7:]:
    chex.assert_trees_all_equal({k: v for host in hosts for k, v in next(host).items()}, batch)


def _batches(dataset, devices=1):
  mesh = meshes.make(MeshConfig(), jax.devices()[:devices])
  return dataset.batches(mesh)


def test_batches_are_the_rows_on_any_devices_and_their_state_is_json(dataset):
  data = dataset()
  whole = _take(_rows(data), 6)
  one, four = _batches(data), _batches(data, 4)
  _take(one, 3)
  state = json.loads(json.dumps(one.state()))
  four.restore(state)
  for expected in whole[3:]:
    batch = next(four)
    assert set(batch) == {"tokens", "targets", "weights", "segment_ids"}
    for name, array in batch.items():
      np.testing.assert_array_equal(array, np.stack([expected[i][name] for i in range(BATCH)]))
  assert 0 < four.padding < 0.5


def test_a_place_behind_the_rows_that_are_there_is_that_of_the_next():
  """As a corpus has it that has grown: other documents fill the rows, and fewer of them."""
  documents = [np.arange(size, dtype=np.int32) for size in (9, 5, 7, 3) * 20]
  config = DataConfig(length=16, packing=PackingConfig("best_fit", window=2))

  def stream(cursor):
    made = streams.Packed(documents.__getitem__, config)
    made.seek(cursor)
    return made

  rows, again = stream(packing.Cursor(0, 0, 0)), stream(packing.Cursor(0, 0, 9))
  while rows.cursor.document == 0:  # the rows that are filled together
    next(rows)
  chex.assert_trees_all_equal(next(again), next(rows))
  assert again.cursor == rows.cursor


def test_windows_need_no_more_than_a_position(corpora):
  config = DataConfig(source="text", paths=str(corpora["text"]), length=32, batch_size=BATCH, validation_fraction=0.3)
  data = datasets.load(config)
  first = _batches(data)
  batches = _take(first, 5)
  assert first.state() == {"rows": 5 * BATCH, "identity": dataclasses.asdict(data.identity)}
  again = _batches(datasets.load(config))
  again.restore({"rows": 3 * BATCH})
  chex.assert_trees_all_equal(_take(again, 2), batches[3:])
  rows = windows.training(datasets.sources.load(config).training, config)
  chex.assert_trees_all_equal(np.asarray(batches[1]["tokens"][2]), rows[BATCH + 2]["tokens"])


def test_rows_are_shared_by_weight(dataset):
  """Of 2,400 rows the sources have their shares, within four standard deviations."""
  data = dataset(shards=8)
  made = [data.training(shard) for shard in range(8)]
  counts = np.zeros(3)
  for mixture in made:
    drawn = [mixture._streams.index(mixture._next()) for mixture.drawn in range(300)]
    counts += np.bincount(drawn, minlength=3)
  shares = np.array([3, 2, 1]) / 6
  assert (abs(counts / 2400 - shares) < 4 * np.sqrt(shares * (1 - shares) / 2400)).all()
