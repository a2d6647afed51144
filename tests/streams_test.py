"""All doors on one run, without a terminal: output is latin-1, input is closed, names and texts are neither."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

from mc_jax.training import metrics

ROOT = pathlib.Path(__file__).parent.parent
NAME = "ein € für 漢"
PATHS = ["workdir", "to", "json", "out", "png", "plot", "prompt_file", "save_prompt", "load_prompt", "include_path"]
TINY = [
  "--config=configs/quickstart.py",
  "--config.data.source=text",
  "--config.data.validation_fraction=0.3",
  "--config.data.validation_tokens=64",
  "--config.data.length=16",
  "--config.data.batch_size=4",
  "--config.model.layers=1",
  "--config.model.d_model=16",
  "--config.model.mlp_dim=16",
  "--config.model.pattern=attention",
  "--config.train.steps=2",
]


def _run(home, door, *flags):
  cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
  environment = os.environ | cache | {"PYTHONIOENCODING": "latin-1", "HOME": str(home), "PYTHONPATH": str(ROOT)}
  line = '"$@" <&- 2>&1'
  command = ["bash", "-c", line, "bash", sys.executable, "-m", f"mc_jax.{door}", *flags]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
  return done.returncode, done.stdout.decode("latin-1")


@pytest.mark.slow
def test_every_door_on_a_run_whose_names_and_texts_no_terminal_here_can_show(tmp_path):
  texts = tmp_path / NAME
  texts.mkdir()
  for i in range(10):
    (texts / f"漢{i}.txt").write_text(f"漢字 {i} € " * 40, encoding="utf-8")
  data, workdir = f"--config.data.paths={texts}", f"--workdir=~/runs {NAME}"
  run = tmp_path / f"runs {NAME}"
  status, printed = _run(tmp_path, "train", *TINY, data, workdir, "--config.train.sample_length=8")
  assert status == 0, printed
  assert f"runs {NAME}".encode("latin-1", "backslashreplace").decode("latin-1") in printed
  assert [record["step"] for record in metrics.read(run)] == [1, 2]
  assert str(run) in (run / "report.txt").read_text(encoding="utf-8")
  status, printed = _run(tmp_path, "train", *TINY, data, workdir)  # complete: only reported again
  assert status == 0, printed

  status, printed = _run(tmp_path, "generate", workdir)
  assert (status, printed) == (
    2,
    "error: the prompt is empty: give --prompt, --prompt_file or text on standard input\n",
  )
  (tmp_path / "prompt.txt").write_text("漢 €", encoding="utf-8")
  saved = ["--save_prompt=~/saved", "--temperature=0", "--max_tokens=4", "--context=20"]
  status, printed = _run(tmp_path, "generate", workdir, "--prompt_file=~/prompt.txt", *saved)
  assert status == 0, printed
  assert "8 tokens" in printed  # a separator, and the bytes of the prompt
  assert (tmp_path / "saved" / "told").is_dir()
  status, printed = _run(tmp_path, "generate", workdir, "--load_prompt=~/saved", "--prompt=€", "--max_tokens=4")
  assert status == 0, printed
  status, printed = _run(tmp_path, "evaluate", workdir, "--tasks=perplexity", "--lengths=8,16", f"--name={NAME}")
  assert status == 0, printed
  assert json.loads((run / "evaluation" / f"{NAME}.json").read_text(encoding="utf-8"))["workdir"] == str(run)
  status, printed = _run(tmp_path, "evaluation.compare", f"漢=~/runs {NAME}/evaluation/{NAME}.json", "--png=~/a.png")
  assert status == 0, printed
  status, printed = _run(tmp_path, "export", workdir, f"--to=~/{NAME}2")
  assert status == 0, printed
  assert {path.name for path in (tmp_path / f"{NAME}2").iterdir()} == {"config.json", "model.safetensors"}
  out = ["--source=text", f"--paths={texts}", "--tokenizer=bytes", "--out=~/漢", "--processes=1"]
  status, printed = _run(tmp_path, "data.prepare", *out)
  assert status == 0, printed
  assert (tmp_path / "漢" / "manifest.json").exists()
  assert not any(pathlib.Path(ROOT).glob("~*"))

  ablation = [*TINY, data, "--config.train.sample_length=8", f"--workdir=~/{NAME}3", "--grid=model.heads=1"]
  status, printed = _run(tmp_path, "ablate", *ablation)
  assert status == 0, printed
  (log,) = (tmp_path / f"{NAME}3" / "cells").glob("*/log.txt")
  assert NAME in log.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "mc_jax").rglob("*.py")), ids=lambda path: path.stem)
def test_paths_are_path_flags_and_text_files_name_their_encoding(path):
  for call in (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)):
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name in ("read_text", "write_text"):
      assert {"encoding"} & {keyword.arg for keyword in call.keywords}, f"line {call.lineno}"
    if name == "DEFINE_string":
      assert call.args[0].value not in PATHS, f"line {call.lineno}: cli.path_flag"
