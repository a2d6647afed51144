"""Bits per byte divide by the bytes of the text itself, whatever the tokenizer and wherever rows cut it."""

import io
import random

import numpy as np
import pytest
import sentencepiece
import tokenizers as huggingface
import written

from mc_jax.data import DataConfig, PackingConfig, datasets, preparation, tokenizers
from mc_jax.data.config import SourceConfig
from mc_jax.data.documents import Documents
from mc_jax.data.formats import blocks
from mc_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("in_process")
KINDS = ("bpe", "sentencepiece", "unigram", "wordpiece")


@pytest.fixture(scope="module")
def chinese():
  """40 documents of Chinese characters, emoji of 4 bytes, accents, doubled spaces and U+FFFD."""
  rng = random.Random(0)
  letters = [chr(0x4E00 + i) for i in range(300)]
  words = ["🙂", "🧠🧠", "\ufffd", "Café  naïve", " "]
  return [
    "".join(rng.choice(letters if rng.random() < 0.9 else words) for _ in range(rng.randrange(50, 150)))
    for _ in range(40)
  ]


@pytest.fixture(scope="module")
def made(tmp_path_factory, chinese):
  """{kind: path} of tokenizers: one that gives every text back, and three that normalize or do not know it all."""
  folder = tmp_path_factory.mktemp("tokenizers")
  tokenizers.train_bpe(chinese, 400, folder / "bpe.json")  # too few ids for whole characters
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(chinese[:5]),
    model_writer=model,
    vocab_size=550,
    hard_vocab_limit=False,
    minloglevel=2,
    byte_fallback=True,
  )
  (folder / "sentencepiece.model").write_bytes(model.getvalue())
  models, trainers, normalizers = huggingface.models, huggingface.trainers, huggingface.normalizers
  unigram = huggingface.Tokenizer(models.Unigram())
  unigram.pre_tokenizer = huggingface.pre_tokenizers.Metaspace()
  unigram.decoder = huggingface.decoders.Metaspace()
  special = {"special_tokens": ["<unk>", "</s>"], "unk_token": "<unk>"}
  unigram.train_from_iterator(chinese[:5], trainers.UnigramTrainer(vocab_size=350, show_progress=False, **special))
  wordpiece = huggingface.Tokenizer(models.WordPiece(unk_token="[UNK]"))
  wordpiece.normalizer = normalizers.BertNormalizer()
  wordpiece.pre_tokenizer = huggingface.pre_tokenizers.BertPreTokenizer()
  wordpiece.decoder = huggingface.decoders.WordPiece()
  wordpiece.train_from_iterator(
    chinese[:5], trainers.WordPieceTrainer(vocab_size=350, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
  )
  unigram.save(str(folder / "unigram.json"))
  wordpiece.save(str(folder / "wordpiece.json"))
  paths = {kind: str(folder / f"{kind}.json") for kind in ("bpe", "unigram", "wordpiece")}
  return {"bytes": "bytes", "sentencepiece": str(folder / "sentencepiece.model")} | paths


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, chinese):
  path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
  path.write_bytes(written.lines(chinese))
  return SourceConfig(source="jsonl", paths=str(path))


def _validation(source, tokenizer, length, tokens=0, **fields):
  config = DataConfig(
    source=source.source,
    paths=source.paths,
    tokenizer=tokenizer,
    length=length,
    batch_size=1,
    validation_tokens=tokens,
    validation_fraction=0.4,
    packing=PackingConfig("concat", **fields),
  )
  return datasets.load(config).validation[source.source]


def _prepared(corpus, tokenizer, folder):
  preparation.prepare(corpus, str(folder), tokenizer, shards=1)
  return SourceConfig(source="tokens", paths=str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_length_hold_the_bytes_that_bytes_hold(corpus, made, kind, chinese, tmp_path):
  loaded = tokenizers.load(made[kind])
  back = [loaded.decode(ids) == text for ids, text in zip(loaded.encode(chinese), chinese, strict=True)]
  assert all(back) if kind == "bpe" else not all(back)
  expected = {corpus.source: _validation(corpus, "bytes", 64).count}
  # Ids carry no names of files: others are held out.
  expected["tokens"] = _validation(_prepared(corpus, "bytes", tmp_path / "bytes"), "bytes", 64).count
  for source in (corpus, _prepared(corpus, made[kind], tmp_path / kind)):
    for length in (16, 64, 256, 1024):
      assert _validation(source, made[kind], length).count == expected[source.source] > 2000
    assert _validation(source, made[kind], 64, align=16).count == expected[source.source]


@pytest.mark.parametrize("kind", KINDS)
def test_where_validation_ends_inside_a_document_the_rest_is_not_counted(corpus, made, kind, tmp_path):
  """As fine as the rows are: what each more of them adds, and both sources alike."""
  prepared = _prepared(corpus, made[kind], tmp_path / kind)
  whole = _validation(corpus, made[kind], 16)
  counts = [_validation(corpus, made[kind], 16, 16 * rows).count for rows in range(1, 40)]
  steps = np.diff(counts)
  assert (steps >= 0).all()
  assert steps.max() < 16 * 20
  assert counts[-1] < whole.count
  assert _validation(corpus, made[kind], 16, 16 * len(whole.batches)).count == whole.count
  whole = _validation(prepared, made[kind], 16)
  assert _validation(prepared, made[kind], 16, 16 * len(whole.batches)).count == whole.count


def test_a_cut_of_bytes_of_whole_characters_is_exact(corpus, made, chinese):
  """The ids of a byte-level BPE are byte strings, whose lengths add up."""
  model = huggingface.Tokenizer.from_file(made["bpe"])
  sizes = {i: len(model.id_to_token(i)) for i in range(1, model.get_vocab_size())}  # a letter there is a byte
  documents = Documents(blocks(corpus), tokenizers.load(made["bpe"]))
  for i in range(5):
    ids, text = documents[i][1:-1], documents.text(i)
    ends = np.cumsum([len(letter.encode()) for letter in text])
    before = np.cumsum([0] + [sizes[int(number)] for number in ids])
    assert before[-1] == ends[-1] == documents.text_bytes(i)
    for count in range(len(ids) + 1):
      floor = max((end for end in ends if end <= before[count]), default=0)
      found = documents.text_bytes(i, count)
      assert found == floor or text[list(ends).index(floor) + 1 if floor else 0] == "\ufffd"
      assert floor <= found <= floor + 3


def test_bytes_are_counted_as_targets(corpus):
  validation = _validation(corpus, "bytes", 64, 64 * 5)
  assert validation.count == sum(batch["weights"].sum() for batch in validation.batches) == 64 * 5


def test_folders_that_do_not_note_bytes_are_decoded(corpus, made, chinese, tmp_path):
  source = _prepared(corpus, made["bpe"], tmp_path / "out")
  expected = [len(text.encode()) for text in chinese]
  for change in (lambda text: text, lambda text: text.replace('"tokens-00000-of-00001.lengths"', '""')):
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(change(manifest.read_text()))
    loaded = tokenizers.load(made["bpe"])
    documents = Documents(blocks(source, loaded.fingerprint), loaded)
    assert [documents.text_bytes(i) for i in range(len(documents))] == expected


def test_a_torn_file_of_lengths_is_named(corpus, made, tmp_path):
  source = _prepared(corpus, made["bpe"], tmp_path / "out")
  path = tmp_path / "out" / "tokens-00000-of-00001.lengths"
  path.write_bytes(path.read_bytes()[:-8])
  with pytest.raises(ConfigError, match=r"tokens-00000-of-00001\.lengths does not belong to the 40 records"):
    blocks(source)
