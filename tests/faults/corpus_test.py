"""A run resumes on the data and the tokenizer that it was trained on, or says what differs."""

import dataclasses
import json
import os
import random
import shutil

import jax
import pytest
from etils import epath
from marks import slow

from mc_jax import storage
from mc_jax.data import PackingConfig, PartConfig, preparation, tokenizers
from mc_jax.data.config import SourceConfig
from mc_jax.errors import ConfigError
from mc_jax.training import config as config_lib
from mc_jax.training import loop, metrics, trained

WORDS = ("memory", "segment", "chunk", "gate", "key", "value")


def _texts(count, seed=0):
  words = random.Random(seed)
  return [" ".join(words.choice(WORDS) for _ in range(words.randrange(5, 60))) for _ in range(count)]


def _files(folder, count, seed=0, first=0):
  folder.mkdir(exist_ok=True)
  for i, text in enumerate(_texts(count, seed), first):
    (folder / f"{i}.txt").write_text(text)


def _lines(path, count, seed=0):
  path.parent.mkdir(exist_ok=True)
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in _texts(count, seed)))


def _bpe(folder, ids):
  folder.mkdir(exist_ok=True)
  tokenizers.train_bpe(_texts(40), ids, folder / "tokenizer.json")
  return str(folder / "tokenizer.json")


def _prepare(text, out, ids):
  """A folder of ids with a tokenizer of its own."""
  shutil.rmtree(out, ignore_errors=True)
  tokenizer = _bpe(out, ids)
  preparation.prepare(SourceConfig(source="text", paths=str(text)), str(out), tokenizer, shards=1)
  return tokenizer


@pytest.fixture
def config(tiny):
  """Makes a configuration of two steps: config(source, paths, **fields)."""

  def make(source, paths, method="best_fit", **fields):
    fields = {"steps": 2, "eval_every": 2, "checkpoint_every": 2, "vocab_size": 320, "pattern": "attention"} | fields
    return tiny(source=source, paths=str(paths), packing=PackingConfig(method, window=3), **fields)

  return make


def _train(config, workdir, steps=2, **data):
  fields = {f"data.{name}": value for name, value in data.items()} | {"train.steps": steps}
  return loop.train(config_lib.replace(config, fields), workdir, devices=jax.devices()[:1])


def _refused(message, config, workdir, **data):
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  with pytest.raises(ConfigError, match=message):
    _train(config, workdir, 4, **data)
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.mark.slow
def test_documents_replaced_under_the_same_name(config, tmp_path):
  _lines(tmp_path / "corpus" / "all.jsonl", 300)
  run = config("jsonl", tmp_path / "corpus", "concat")
  _train(run, tmp_path / "run")
  _lines(tmp_path / "corpus" / "all.jsonl", 40, seed=1)
  _refused(r"jsonl: 1 of 1 files has other contents: all\.jsonl", run, tmp_path / "run")


@pytest.mark.parametrize("method", [slow("windows"), "best_fit"])
def test_text_files_removed_and_replaced(config, tmp_path, method):
  _files(tmp_path / "corpus", 40)
  run = config("text", tmp_path / "corpus", method)
  _train(run, tmp_path / "run")
  shutil.copytree(tmp_path / "corpus", tmp_path / "copy")
  for i in range(13):
    (tmp_path / "corpus" / f"{i}.txt").unlink()
  _refused(r"13 of 40 files are gone: 0\.txt, 1\.txt, 10\.txt, 11\.txt and 9 more", run, tmp_path / "run")
  moved = dataclasses.replace(run, data=dataclasses.replace(run.data, paths=str(tmp_path / "copy")))
  text = (tmp_path / "copy" / "7.txt").read_text()
  (tmp_path / "copy" / "7.txt").write_text(text[::-1])  # as many bytes
  _refused(r"1 of 40 files has other contents: 7\.txt", moved, tmp_path / "run")
  (tmp_path / "copy" / "7.txt").write_text(text)
  assert _train(moved, tmp_path / "run", 3).step == 3  # the same files elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("source", ["text", "jsonl", "tokens"])
def test_data_that_have_grown(config, tmp_path, source, capsys):
  corpus = tmp_path / "corpus"
  paths, more = str(corpus), None
  if source == "text":
    _files(corpus, 30)
    run, more = config("text", corpus, "windows"), lambda: _files(corpus, 5, 1, first=30)
  elif source == "jsonl":
    _lines(corpus / "a.jsonl", 60)
    run, more = config("jsonl", corpus), lambda: _lines(corpus / "b.jsonl", 60, 1)
  else:
    _files(tmp_path / "text", 30)
    tokenizer = _prepare(tmp_path / "text", tmp_path / "ids", 300)
    paths = f"{tmp_path / 'ids'},{tmp_path / 'more'}"
    run = config("tokens", tmp_path / "ids", tokenizer=tokenizer)

    def more():
      _files(tmp_path / "new", 30, 1)
      out = str(tmp_path / "more")
      preparation.prepare(SourceConfig(source="text", paths=str(tmp_path / "new")), out, tokenizer, shards=1)

  _train(run, tmp_path / "run", 3)  # where best_fit is in the middle of what it fills together
  more()
  _refused(rf"grown since the checkpoint: {source} has .* new file.*allow_growth=True", run, tmp_path / "run",
           paths=paths)  # fmt: skip
  assert _train(run, tmp_path / "run", 12, paths=paths, allow_growth=True).step == 12
  assert "the validation set has other documents" in capsys.readouterr().out
  assert _train(run, tmp_path / "run", 13, paths=paths).step == 13  # once it is known, it is the run's
  assert "have grown since" not in capsys.readouterr().out
  assert [record["step"] for record in metrics.read(tmp_path / "run")] == list(range(1, 14))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"data.seed": 1}, "data.seed: 0 in the checkpoint, 1 now"),
    ({"data.validation_fraction": 0.5}, "data.validation_fraction: 0.3 in the checkpoint, 0.5 now"),
    ({"data.length": 32}, "data.length: 16 in the checkpoint, 32 now"),
    ({"data.packing.method": "concat"}, "data.packing.method: 'windows' in the checkpoint, 'concat' now"),
    ({"data.source": "stdlib", "data.paths": ""}, "data.source: 'text' in the checkpoint, 'stdlib' now"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_choose_other_rows_or_documents_of_windows(config, texts, tmp_path, fields, message):
  run = config("text", texts, "windows")
  with pytest.raises(ConfigError, match=r"(?s)other documents were held out.*another --workdir") as raised:
    loop.require_order(run, config_lib.replace(run, fields))
  assert message in str(raised.value)
  for same in ({"data.batch_size": 8}, {"data.workers": 1}, {"data.on_error": "skip"}, {"data.allow_growth": True}):
    loop.require_order(run, config_lib.replace(run, same))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"data.shards": 3}, "data.shards: 4 in the checkpoint, 3 now"),
    ({"data.batch_size": 8}, "data.shards: 4 in the checkpoint, 8 now"),
    ({"data.packing.window": 4}, "data.packing.window: 3 in the checkpoint, 4 now"),
    ({"data.packing.method": "windows"}, "data.packing.method: 'best_fit' in the checkpoint, 'windows' now"),
    ({"data.sources.a.field": "body"}, "data.sources.a.field: 'text' in the checkpoint, 'body' now"),
    ({"data.sources.a.split": "training"}, "data.sources.a.split: 'both' in the checkpoint, 'training' now"),
    ({"data.sources.b.weight": 0.0}, "data.sources: ['a', 'b'] in the checkpoint, ['a'] now"),
    ({"data.sources.b.source": "copying"}, "data.sources.b.source: 'mqar' in the checkpoint, 'copying' now"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_choose_other_rows_or_documents_of_mixtures(config, fields, message):
  parts = {"a": PartConfig(source="jsonl", paths="x"), "b": PartConfig(source="mqar")}
  run = config("mixture", "", sources=parts)
  stored = config_lib.from_dict(json.loads(json.dumps(dataclasses.asdict(run))))
  with pytest.raises(ConfigError) as raised:
    loop.require_order(stored, config_lib.replace(run, fields))
  assert message in str(raised.value)
  for same in (
    {"data.sources.a.weight": 2.0},
    {"data.sources.a.long_weight": 3.0},
    {"data.sources.b.mqar.pairs": (4,)},
  ):
    loop.require_order(stored, config_lib.replace(run, same))


def _forget(workdir):
  """Takes the identity out of a checkpoint, as if it had been written before there was one."""
  (checkpoint,) = (workdir / "checkpoints").iterdir()
  path = checkpoint / "data" / "metadata"
  state = json.loads(path.read_text())
  del state["identity"]
  path.write_text(json.dumps(state))
  storage.write_digests(epath.Path(checkpoint))


def test_a_checkpoint_without_an_identity_is_used_and_that_is_said(config, tmp_path, capsys):
  _files(tmp_path / "corpus", 12)
  run = config("text", tmp_path / "corpus")
  _train(run, tmp_path / "run")
  _forget(tmp_path / "run")
  assert trained.load(tmp_path / "run").identity is None
  (tmp_path / "corpus" / "3.txt").unlink()
  assert _train(run, tmp_path / "run", 3).step == 3
  assert "does not record which files and tokenizer it was trained with" in capsys.readouterr().out
  (tmp_path / "corpus" / "4.txt").unlink()  # now it is known
  _refused("1 of 11 files is gone", run, tmp_path / "run")


@pytest.fixture
def run_of_ids(config, tmp_path):
  """(configuration, workdir) of a run on prepared ids."""
  _files(tmp_path / "text", 30)
  run = config("tokens", tmp_path / "ids", tokenizer=_prepare(tmp_path / "text", tmp_path / "ids", 300))
  _train(run, tmp_path / "run")
  return run, tmp_path / "run"


@pytest.mark.slow
def test_ids_of_another_vocabulary_at_the_same_path(run_of_ids, door, tmp_path):
  run, workdir = run_of_ids
  flags = [f"--workdir={workdir}", "--prompt=memory gate", "--max_tokens=10"]
  before = door("generate", *flags)
  assert before.returncode == 0, before.stderr
  _prepare(tmp_path / "text", tmp_path / "ids", 280)
  _refused("the tokenizer has another fingerprint: .* then, .* now", run, workdir)
  assert door("generate", *flags).stdout == before.stdout  # by the tokenizer that the run kept
  theirs = f"--config.data.tokenizer={tmp_path / 'ids' / 'tokenizer.json'}"
  for done in (
    door("generate", *flags, theirs),
    door("evaluate", f"--workdir={workdir}", "--tasks=niah1", "--lengths=512", "--rows=1", theirs),
    door("evaluate", f"--workdir={workdir}", "--tasks=perplexity", theirs),
  ):
    assert done.returncode == 2, done.stdout
    assert "is not the tokenizer that the model was trained with" in done.stderr
  done = door("evaluate", f"--workdir={workdir}", "--tasks=perplexity")
  assert done.returncode == 2, done.stdout
  assert "was tokenized with another tokenizer" in done.stderr


def test_a_run_whose_tokenizer_is_gone_resumes_with_its_own(config, tmp_path, capsys):
  _lines(tmp_path / "corpus" / "a.jsonl", 60)
  tokenizer = _bpe(tmp_path / "tokenizer", 300)
  run = config("jsonl", tmp_path / "corpus", tokenizer=tokenizer)
  _train(run, tmp_path / "run")
  kept = tmp_path / "run" / "tokenizer.json"
  assert kept.read_bytes() == (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
  shutil.rmtree(tmp_path / "tokenizer")
  assert _train(run, tmp_path / "run", 3).step == 3
  assert f"using the run's own copy, {kept}" in capsys.readouterr().out
  kept.unlink()
  with pytest.raises(ConfigError, match="cannot read"):
    _train(run, tmp_path / "run", 4)
  _bpe(tmp_path / "tokenizer", 280)  # another one at the path that old runs read, too
  with pytest.raises(ConfigError, match="is not the tokenizer that the model was trained with"):
    trained.load(tmp_path / "run").tokenizer()
  with pytest.raises(ConfigError, match="is not the tokenizer that the model was trained with"):
    trained.load(tmp_path / "run").tokenizer_file()


@pytest.mark.slow
def test_parameters_of_another_tokenizer_are_no_start(config, tmp_path):
  _lines(tmp_path / "corpus" / "a.jsonl", 60)
  run = config("jsonl", tmp_path / "corpus", tokenizer=_bpe(tmp_path / "tokenizer", 300))
  _train(run, tmp_path / "run")
  run = config_lib.replace(run, {"train.start_from": str(tmp_path / "run")})
  with pytest.raises(ConfigError, match=r"start_from=.* was trained on data.tokenizer=.*, and this run reads "):
    _train(run, tmp_path / "new", tokenizer=_bpe(tmp_path / "other", 280))
  with pytest.raises(ConfigError, match=r"this run reads symbols without text"):
    _train(run, tmp_path / "new", source="mqar", paths="", tokenizer="bytes", length=64, **{"mqar.vocab_size": 320})
  assert _train(run, tmp_path / "new", tokenizer=_bpe(tmp_path / "again", 300)).step == 2


@pytest.mark.slow
def test_a_run_that_was_moved_is_whole(config, door, tmp_path):
  """Its paths were relative: the message says to what. What is kept in the run needs none."""
  here, there = tmp_path / "here", tmp_path / "there"
  here.mkdir()
  _lines(here / "corpus" / "a.jsonl", 60)
  _bpe(here / "tokenizer", 300)
  settings = config("jsonl", "corpus", tokenizer="tokenizer/tokenizer.json")
  before = os.getcwd()
  try:
    os.chdir(here)
    _train(settings, "run")
  finally:
    os.chdir(before)
  there.mkdir()
  shutil.move(here / "run", there / "run")
  done = door("generate", "--workdir=run", "--prompt=memory", "--max_tokens=5", folder=there)
  assert done.returncode == 0, done.stderr
  done = door("evaluate", "--workdir=run", "--tasks=perplexity", folder=there)
  assert done.returncode == 2
  assert f"data.paths: no file matches 'corpus'; relative paths are read from {there}: start in the" in done.stderr
  for flags in ([f"--config.data.paths={here / 'corpus'}"], ["--name=again"]):
    folder = there if "again" not in flags[0] else here
    done = door("evaluate", f"--workdir={there / 'run'}", "--tasks=perplexity", *flags, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "the data differ" not in done.stderr
  _lines(here / "corpus" / "b.jsonl", 20, 1)
  done = door("evaluate", f"--workdir={there / 'run'}", "--tasks=perplexity", folder=here)
  assert done.returncode == 0, done.stderr
  assert "the data differ from those of training" in done.stderr
  assert "1 new file (b.jsonl) in jsonl" in done.stderr
