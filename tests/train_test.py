"""The door: `python -m mc_jax.train` as its user meets it."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

from mc_jax.training import config, metrics

ROOT = pathlib.Path(__file__).parent.parent


def _train(*flags):
  command = [sys.executable, "-m", "mc_jax.train", *flags]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


CONFIGS = sorted(set((ROOT / "configs").glob("*.py")) - {ROOT / "configs" / "common.py"})  # which some of them share


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_have_no_problems(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert config.from_config_dict(module.get_config()).problems() == []
  assert f"--config=configs/{path.name}" in module.__doc__


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--config.model.memory.agregation=ssc"], "nearest field is model.memory.aggregation"),
    (["--config.model.memory.aggregation=sum", "--config.model.heads=0"], "grm"),
    (["--config=configs/nothing.py"], "configs/nothing.py"),
  ],
  ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_end_with_a_clean_message(door, tmp_path, flags, message):
  done = door("train", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}", *flags)
  assert done.returncode != 0
  assert message in done.stderr
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_with_every_kind_of_flag(tmp_path):
  texts = tmp_path / "texts"
  texts.mkdir()
  for i in range(10):
    (texts / f"{i}.txt").write_text("a memory of a memory\n" * 40)
  done = _train(
    "--config=configs/quickstart.py",
    f"--workdir={tmp_path / 'run'}",
    "--profile=2-3",
    "--config.data.source=text",
    f"--config.data.paths={texts}",
    "--config.data.validation_fraction=0.3",
    "--config.data.length=16",
    "--config.model.pattern=attention",
    "--config.model.d_model=16",
    "--config.train.steps=4",
    "--config.train.log_every=2",
    "--config.train.sample_length=4",
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert any(line.startswith("step 2/4: ") and line.endswith(" left") for line in lines)
  assert "this model, validation" in done.stdout
  assert [record["step"] for record in metrics.read(tmp_path / "run")] == [1, 2, 3, 4]
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
