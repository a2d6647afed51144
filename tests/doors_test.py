"""Every door on every kind of run: it does what it is for, or says in a line why it cannot and what would."""

import functools
import io
import json
import math
import random
import re
import shlex

import pytest
import sentencepiece
from etils import epath
from marks import slow

from mc_jax.ablation import grid
from mc_jax.data import datasets, learning, preparation
from mc_jax.data.config import SourceConfig
from mc_jax.inference import export
from mc_jax.training import metrics, replay, state, trained

BASE = """
from mc_jax.training import config

def get_config():
  c = config.default()
  c.model.pattern, c.model.layers, c.model.d_model, c.model.heads, c.model.mlp_dim = ("attention",), 1, 16, 2, 16
  c.model.remat, c.model.vocab_size = "none", 320
  c.data.length, c.data.batch_size, c.data.validation_fraction, c.data.validation_tokens = 64, 4, 0.3, 512
  c.train.steps, c.train.log_every, c.train.eval_every, c.train.checkpoint_every = 2, 1, 2, 2
  c.train.sample_length, c.optimizer.warmup_steps = 8, 1
"""
TEXT = 'source="text", paths="{0}/text"'
TOKENS = 'source="tokens", paths="{0}/tokens"'
TOKENIZER = 'c.data.tokenizer, c.data.packing.method = "{0}/tokens/tokenizer.json", "best_fit"'
# What the configuration of a kind of run has besides; {0}: the folder of the corpora.
KINDS = {
  "windows": ['c.data.source, c.data.paths = "text", "{0}/text"'],
  "jsonl": [TOKENIZER, 'c.data.source, c.data.paths = "jsonl", "{0}/jsonl"'],
  "pieces": [
    "c.model.vocab_size = 64",  # more than the tokenizer has
    'c.data.tokenizer, c.data.packing.method = "{0}/pieces.model", "concat"',
    'c.data.source, c.data.paths = "jsonl", "{0}/jsonl"',
  ],
  "tokens": [TOKENIZER, 'c.data.source, c.data.paths = "tokens", "{0}/tokens"'],
  "mixture": [
    TOKENIZER,
    'c.data.source = "mixture"',
    f"c.data.sources.ids = config.source({TOKENS}, weight=2.0)",
    f"c.data.sources.words = config.source({TEXT})",
  ],
  "text and task": [
    TOKENIZER,
    'c.data.source = "mixture"',
    'c.data.sources.recall = config.source(source="mqar")',
    "c.data.sources.recall.mqar.vocab_size, c.data.sources.recall.mqar.pairs = 320, (4,)",
    f"c.data.sources.ids = config.source({TOKENS})",
  ],
  "mqar": ['c.data.source, c.data.mqar.vocab_size, c.data.mqar.pairs = "mqar", 64, (4,)'],
  "niah": [
    TOKENIZER,
    'c.data.source, c.data.length, c.data.batch_size, c.data.validation_tokens = "niah", 512, 2, 1024',
  ],
  "copying": ['c.data.source, c.data.copying.shortest, c.data.copying.longest = "copying", 3, 5'],
}
KEPT = {kind: {"tokenizer.json"} for kind, lines in KINDS.items() if TOKENIZER in lines} | {
  "pieces": {"tokenizer.model"}
}
SYMBOLS = ("mqar", "copying")
TASKS = dict.fromkeys(KINDS, ("perplexity",)) | {"mqar": ("mqar", "--rows=8"), "niah": ("niah1", "--rows=2")}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
  """A folder of the same documents as text, JSON lines and ids."""
  folder, words = tmp_path_factory.mktemp("corpora"), random.Random(0)
  texts = [" ".join(words.choice(["memory", "segment", "chunk", "gate"]) for _ in range(60)) for _ in range(12)]
  for name in ("text", "jsonl"):
    (folder / name).mkdir()
  for i, text in enumerate(texts):
    (folder / "text" / f"{i}.txt").write_text(text)
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts), model_writer=model, vocab_size=80, hard_vocab_limit=False, minloglevel=2
  )
  (folder / "pieces.model").write_bytes(model.getvalue())
  (folder / "jsonl" / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  source, tokenizer = SourceConfig(source="text", paths=str(folder / "text")), folder / "tokens" / "tokenizer.json"
  tokenizer.parent.mkdir()
  learning.train(source, 300, 10_000, epath.Path(tokenizer))
  preparation.prepare(source, str(folder / "tokens"), str(tokenizer), shards=2)
  return folder


@pytest.fixture(scope="module")
def run(corpora, door, tmp_path_factory):
  """(kind) -> (workdir, flag --config of what trained there)."""

  @functools.cache
  def make(kind):
    folder = tmp_path_factory.mktemp(kind.replace(" ", "_"))
    lines = [f"  {line.format(corpora)}\n" for line in KINDS[kind]]
    (folder / "config.py").write_text(f"{BASE}{''.join(lines)}  return c\n")
    config = f"--config={folder / 'config.py'}"
    done = door("train", config, f"--workdir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    assert ("continuation, temperature" in done.stdout) == (kind not in (*SYMBOLS, "niah"))
    return folder / "run", config

  return make


# Documents with a tokenizer, and a recall task; what each of the others reads is tested beside its reader.
QUICK = ("tokens", "mqar")
EVERY = pytest.mark.parametrize("kind", [kind if kind in QUICK else slow(kind) for kind in KINDS])


def _works(done):
  assert done.returncode == 0, done.stderr
  return done.stdout


def _refuses(done, message):
  assert done.returncode == 2, done.stdout
  assert message in done.stderr
  assert done.stderr.count("\n") == 1


@EVERY
def test_generate(run, door, kind):
  flags = [f"--workdir={run(kind)[0]}", "--prompt=memory gate", "--max_tokens=20", "--temperature=2", "--stop=zzz"]
  done = door("generate", *flags)
  if kind in SYMBOLS:
    _refuses(done, f"trained on the symbols of data.source={kind}, which stand for no text")
    return
  assert len(_works(done).strip()) >= 5
  (tokens,) = re.findall(r"prompt +(\d+) tokens", done.stderr)
  whole = "memory gate" if kind == "windows" else trained.load(run(kind)[0]).tokenizer().encode(["memory gate"])[0]
  assert int(tokens) == len(whole) + (kind != "niah")  # whose rows are no documents


@EVERY
def test_evaluate(run, door, kind):
  workdir, _ = run(kind)
  task, *options = TASKS[kind]
  done = door("evaluate", f"--workdir={workdir}", f"--tasks={task}", *options)
  if kind == "copying":
    _refuses(done, "perplexity is of text; the data of this run are recall tasks alone (copying)")
    return
  _works(done)
  (name,) = (workdir / "evaluation").glob("*.json")
  values = json.loads(name.read_text())["results"][-1]["values"]
  (record,) = [record for record in metrics.read(workdir) if record["step"] == 2]
  if task == "perplexity":
    assert values["bits_per_byte"] == pytest.approx(record["validation_bits_per_byte"], rel=1e-5)
  else:  # the same rows as in training's validation
    assert values["loss"] == pytest.approx(record["validation_bits_per_answer"] * math.log(2), rel=1e-5)


@EVERY
def test_export(run, door, kind, tmp_path):
  workdir, _ = run(kind)
  assert "MB of float32" in _works(door("export", f"--workdir={workdir}", f"--to={tmp_path / 'out'}"))
  model, _ = export.load(tmp_path / "out")
  assert model == trained.load(workdir).config.model
  files = {path.name for path in (tmp_path / "out").iterdir()}
  assert files == {export.WEIGHTS, export.CONFIG} | KEPT.get(kind, set())


@EVERY
def test_train_again_and_replay(run, door, kind, alone):
  """A step more, and a step that was dumped."""
  workdir, config = run(kind)
  flags = [config, f"--workdir={workdir}", "--config.train.sample_length=0"]
  printed = _works(door("train", *flags, "--config.train.steps=3"))
  assert "resuming from the checkpoint of step 2" in printed
  assert metrics.read(workdir)[-1]["step"] == 3
  settings = grid.read([config])
  batch = next(datasets.load(settings.data).batches(alone))
  replay.dump(epath.Path(workdir), 3, state.create(settings, alone), batch, settings)
  printed = _works(door("train", *flags, "--replay=3"))
  assert re.search(r"losses not finite +none", printed)


@EVERY
def test_start_from(run, door, kind, tmp_path):
  workdir, config = run(kind)
  flags = [f"--config.train.start_from={workdir}", "--config.train.steps=1", "--config.train.sample_length=0"]
  printed = _works(door("train", config, *flags, f"--workdir={tmp_path / 'new'}"))
  assert f"starting with the parameters of step {trained.load(workdir).step} in {workdir}" in printed
  assert "was" not in re.findall(r"starting with.*\n(.*)", printed)[0]


@EVERY
def test_ablate(run, door, kind, tmp_path):
  """The arguments of each command that a cell's process runs."""
  task, *options = TASKS[kind]
  flags = [run(kind)[1], f"--workdir={tmp_path}", f"--tasks={task}", *options, "--config.train.sample_length=0"]
  done = door("ablate", *flags, "--dry_run")
  if kind == "copying":
    _refuses(done, "--tasks=perplexity is of text; data.source=copying is a recall task")
    return
  commands = [line.strip() for line in _works(done).splitlines() if line.strip().startswith("python -m")]
  assert len(commands) == 2
  for command in commands:
    module, *arguments = shlex.split(command)[2:]
    _works(door(module.removeprefix("mc_jax."), *arguments))
  assert f"{task}:" not in _works(door("ablate", *flags, "--dry_run"))
  assert "finished" in door("ablate", *flags, "--dry_run").stdout
