"""Files that a run reads cannot make it run code."""

import ast
import pathlib
import pickle

import pytest
from etils import epath

from mc_jax.data import datasets
from mc_jax.training import state
from mc_jax.training.checkpointing import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent.parent
SOURCES = sorted((ROOT / "mc_jax").rglob("*.py"))
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
UNSAFE_CALLS = {"eval", "exec", "system", "popen"}
UNSAFE_OPTIONS = {"allow_pickle", "shell", "trust_remote_code"}


def _unsafe(tree):
  """What of a module's source could run what a file holds."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = {alias.name.partition(".")[0] for alias in node.names} | {
        (getattr(node, "module", "") or "").partition(".")[0]
      }
      yield from names & UNSAFE_MODULES
    if isinstance(node, ast.Call):
      called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
      module = getattr(getattr(node.func, "value", None), "id", "")
      if called in UNSAFE_CALLS and (isinstance(node.func, ast.Name) or module == "os"):
        yield called
      yield from {keyword.arg for keyword in node.keywords} & UNSAFE_OPTIONS


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_evaluates_or_calls_a_shell(path):
  assert list(_unsafe(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
  "line",
  [
    "import pickle",
    "from pickle import loads",
    "eval(x)",
    "os.system(x)",
    "np.load(f, allow_pickle=True)",
    "import yaml.x",
  ],
)
def test_unsafe_lines_are_found(line):
  assert list(_unsafe(ast.parse(line)))


def test_a_checkpoint_is_written_and_read_without_pickle(tiny, alone, tmp_path, monkeypatch):
  config = tiny(pattern="attention")
  start, data = state.create(config, alone), datasets.load(config.data).batches(alone)

  def refuse(*_, **__):
    raise AssertionError("pickled")

  for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
    monkeypatch.setattr(pickle, name, refuse)
  with Checkpoints(epath.Path(tmp_path), keep=2) as checkpoints:
    checkpoints.save(1, start, data, config)
  with Checkpoints(epath.Path(tmp_path), keep=2) as checkpoints:
    checkpoints.config(1)
    checkpoints.restore(1, state.abstract(config, alone), data)
