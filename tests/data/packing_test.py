"""Packed rows hold every token once, in order, with targets of its own document."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from mc_jax.data import PackingConfig, packing
from mc_jax.data.packing import Cursor

# Documents' lengths without separators; -1 is a document that is left out.
CORPORA = strategies.lists(strategies.integers(-1, 70), min_size=1, max_size=40).filter(lambda sizes: max(sizes) >= 0)
ROWS = strategies.tuples(strategies.sampled_from([8, 12, 32]), strategies.sampled_from([1, 4]))  # length, align


def _documents(sizes):
  """Ids are unique: document i has 1000 i + 1, ..., between two separators 1000 i and 1000 i + 999."""
  return [
    np.array([1000 * i, *(1000 * i + 1 + np.arange(size)), 1000 * i + 999] if size >= 0 else [], np.int32)
    for i, size in enumerate(sizes, 1)
  ]


def _pieces(row):
  """(tokens, targets) of each segment, left to right."""
  ids = row["segment_ids"]
  return [(row["tokens"][ids == n], row["targets"][ids == n]) for n in range(1, ids.max(initial=0) + 1)]


def _check_rows(rows, documents, length, align):
  pairs = []
  for row in rows:
    ids = row["segment_ids"]
    assert all(row[name].shape == (length,) for name in row)
    starts = np.flatnonzero((ids > 0) & (ids != np.concatenate([[0], ids[:-1]])))
    assert (np.diff(ids[ids > 0]) >= 0).all()
    assert list(ids[starts]) == list(range(1, len(starts) + 1))  # each id is one run
    assert (starts % align == 0).all()
    np.testing.assert_array_equal(row["weights"], ids > 0)
    assert (row["tokens"][ids == 0] == 0).all()
    for tokens, targets in _pieces(row):
      np.testing.assert_array_equal(tokens[1:], targets[:-1])
      assert len({n // 1000 for n in (*tokens, *targets)}) == 1  # nothing crosses
      pairs += zip(tokens.tolist(), targets.tolist(), strict=True)
  return pairs


def _pairs(documents):
  return [pair for ids in documents for pair in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True)]


@hypothesis.given(CORPORA, ROWS)
@hypothesis.settings(max_examples=60, deadline=None)
def test_all_of_some_documents(sizes, shape):
  documents = _documents(sizes)
  rows = packing.rows(documents, *shape)
  assert _check_rows(rows, documents, *shape) == _pairs(documents)


@pytest.mark.parametrize("method", ["concat", "best_fit"])
@hypothesis.given(CORPORA, ROWS, strategies.integers(1, 5), strategies.integers(1, 12))
@hypothesis.settings(max_examples=80, deadline=None)
def test_every_token_once_and_any_row_can_be_gone_on_from(method, sizes, shape, window, groups):
  """Groups of rows from an endless corpus: what they hold together is a beginning of it."""
  length, align = shape
  config = PackingConfig(method=method, align=align, window=window)
  documents = _documents(sizes)

  def read(number):
    ids = documents[number % len(documents)]
    return ids + 100_000 * (number // len(documents)) if len(ids) else ids  # unique for ever

  cursor, pairs = Cursor(0, 0, 0), []
  for _ in range(groups):
    filled, behind = packing.fill(read, cursor, length, config)
    again, _ = packing.fill(read, cursor, length, config)
    rows = [packing.build(pieces, length, align) for pieces in filled]
    for row, same in zip(rows, again, strict=True):
      np.testing.assert_array_equal(row["tokens"], packing.build(same, length, align)["tokens"])
    found = _check_rows(rows, documents, length, align)
    if method == "concat":
      pairs += found
      assert len(rows) == 1
    else:
      pairs += sorted(found)  # rows of a group are in an order of their own; ids ascend in the corpus
      for pieces in filled:
        for piece in pieces:  # what fits into a row is not cut
          assert len(piece.ids) - 1 > length or (piece.start, piece.stop) == (0, len(piece.ids) - 1)
    cursor = behind
  expected = _pairs([read(number) for number in range(cursor.document)])
  last = read(cursor.document)
  expected += _pairs([last])[: cursor.place] if len(last) else []
  assert pairs == expected


def test_best_fit_by_hand():
  assert packing.best_fit([3, 8, 5, 2, 6], 8, 1) == [[0, 2], [1], [3, 4]]
  assert packing.best_fit([3, 8, 5, 2, 6], 8, 4) == [[0, 3], [1], [2], [4]]


def test_best_fit_pads_little_and_cuts_less_than_concat():
  rng = np.random.default_rng(0)
  sizes = np.minimum(rng.lognormal(4.5, 1.2, 4000), 4000).astype(int)
  documents = _documents(sizes)
  share, cut = {}, {}
  for method in ("concat", "best_fit"):
    cursor, pieces, padding = Cursor(0, 0, 0), [], []
    while cursor.document < 3000:
      filled, cursor = packing.fill(documents.__getitem__, cursor, 1024, PackingConfig(method=method))
      pieces += [piece for row in filled for piece in row]
      padding += [packing.padding(packing.build(row, 1024, 1)["segment_ids"]) for row in filled]
    share[method] = np.mean(padding)
    cut[method] = np.mean([piece.start > 0 for piece in pieces])
  assert share["concat"] == 0
  assert share["best_fit"] < 0.015
  assert cut["best_fit"] < 0.4 * cut["concat"]
