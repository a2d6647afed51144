"""Text is found, checked and split by file."""

import pytest

from mc_jax.data import DataConfig, sources, tokenizers
from mc_jax.errors import ConfigError


def _write(folder, count):
  for i in range(count):
    file = folder / f"part{i % 3}" / f"{i}.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"file {i}: naïve café\n")


def _config(folder, **fields):
  return DataConfig(source="text", paths=str(folder), validation_fraction=0.3, **fields)


def test_every_file_is_in_one_split_whole_and_after_a_separator(tmp_path):
  _write(tmp_path, 20)
  corpus = sources.load(_config(tmp_path))
  assert not set(corpus.training_files) & set(corpus.validation_files)
  assert len(corpus.training_files) + len(corpus.validation_files) == 20
  for stream, files in (
    (corpus.training, corpus.training_files),
    (corpus.validation, corpus.validation_files),
  ):
    texts = stream.tobytes().split(bytes([tokenizers.SEPARATOR]))
    assert texts[0] == b""
    assert texts[1:] == [(tmp_path / file).read_bytes() for file in files]


def test_the_split_of_a_file_depends_on_its_name_and_the_seed_alone():
  names = [f"{i}.py" for i in range(200)]
  training, validation = sources.split(names, 0.1, seed=0)
  again = sources.split(names[::-1] + ["new.py"], 0.1, seed=0)
  assert set(training) <= set(again[0])
  assert set(validation) <= set(again[1])
  assert set(sources.split(names, 0.1, seed=1)[1]) != set(validation)
  assert set(validation) <= set(sources.split(names, 0.2, seed=0)[1])
  assert 5 <= len(validation) <= 40


def test_the_split_survives_moving_the_folder(tmp_path):
  for name in ("here", "there"):
    (tmp_path / name).mkdir()
    _write(tmp_path / name, 20)
  here, there = (sources.load(_config(tmp_path / name)) for name in ("here", "there"))
  assert here.validation_files == there.validation_files


def test_files_folders_and_globs_go_together_and_hidden_files_are_left_out(tmp_path):
  for name in ("a.txt", "b.md", "c/d.txt", "c/e/f.txt", "c/.git/g.txt"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  paths = f"{tmp_path}/*.md, {tmp_path}/c,{tmp_path}/**/f.txt"
  assert list(sources.text(paths)) == ["b.md", "c/d.txt", "c/e/f.txt"]


def test_a_glob_without_a_match_is_named(tmp_path):
  _write(tmp_path, 3)
  with pytest.raises(ConfigError, match=r"data\.paths: no file matches .*\*\.md"):
    sources.text(f"{tmp_path}/**/*.txt,{tmp_path}/*.md")


@pytest.mark.parametrize("data", [b"caf\xe9", b"PK\0\3"])
def test_a_file_that_is_not_text_is_named(tmp_path, data):
  _write(tmp_path, 3)
  (tmp_path / "bad.bin").write_bytes(data)
  with pytest.raises(ConfigError, match=r"bad\.bin is not text"):
    sources.text(str(tmp_path))


@pytest.mark.parametrize(("fraction", "split"), [(1e-9, "validation"), (1 - 1e-9, "training")])
def test_a_split_that_would_be_empty_is_an_error(tmp_path, fraction, split):
  _write(tmp_path, 5)
  config = DataConfig(source="text", paths=str(tmp_path), validation_fraction=fraction)
  with pytest.raises(ConfigError, match=rf"the {split} split would be empty.*validation_fraction"):
    sources.load(config)


def test_the_standard_library_is_there_without_installed_packages():
  files = sources.stdlib()
  assert "argparse.py" in files
  assert sum(map(len, files.values())) > 5_000_000
  assert not any("site-packages" in name or "dist-packages" in name for name in files)
  assert all(sources.is_text(data) for data in files.values())


def test_tokens_are_bytes():
  text = "naïve\n"
  assert tokenizers.decode(tokenizers.encode(text)) == text
  assert tokenizers.decode([tokenizers.SEPARATOR, 65, 0xFF]) == "\nA\ufffd"


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"source": "web"}, "data.source must be one of stdlib, text"),
    ({"source": "text"}, "data.paths must be files, folders or globs"),
    ({"paths": "x"}, "data.paths is not read by data.source=stdlib"),
    ({"length": 0}, "data.length must be at least 1"),
    ({"batch_size": 0}, "data.batch_size must be at least 1"),
    ({"validation_fraction": 0.0}, "data.validation_fraction must be between 0 and 1"),
    ({"validation_tokens": -1}, "data.validation_tokens must be positive, or 0"),
    ({"seed": -1}, "data.seed must be between 0"),
  ],
)
def test_bad_fields_are_named_with_what_would_do(fields, message):
  (problem,) = DataConfig(**fields).problems()
  assert message in problem
