"""Continues a prompt with a trained model: `python -m mc_jax.generate --workdir=RUN --prompt="Once upon a time"`.

Prints the text on standard output as it is generated, and its speed on standard error. With --save_prompt and
--load_prompt a long document is read once and continued many times. Fields of the run's configuration that do not
affect the parameters can be changed, such as --config.model.memory.after_training=moving_average.
"""

import sys

import mc_jax.xla_flags  # noqa: F401  isort: skip  (before jax)
import numpy as np
from absl import flags, logging
from etils import epath

from mc_jax import cli
from mc_jax.data import tokenizers
from mc_jax.errors import ConfigError
from mc_jax.inference import Decoder, Request, continuing, prompts
from mc_jax.memory import decode
from mc_jax.models import CacheConfig
from mc_jax.models.cache import FULL
from mc_jax.training import outputs, report, state, trained

CONFIG = cli.overrides_flag()
WORKDIR = cli.path_flag("workdir", None, "Folder of a run of mc_jax.train, or gs://BUCKET/FOLDER.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; default: standard input, UTF-8.")
PROMPT_FILE = cli.path_flag("prompt_file", None, "File with the text to continue, UTF-8.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 200, "Maximum number of tokens to generate.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Sampling temperature; 0: always the likeliest token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from this many of the likeliest tokens; 0: from all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the likeliest tokens that together have this probability.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the first sample; sample i has seed + i.")
SAMPLES = flags.DEFINE_integer("samples", 1, "Number of continuations, generated as one batch.", lower_bound=1)
STOP = flags.DEFINE_multi_string("stop", [], "Text at which the continuation ends; repeatable.")
DOCUMENT_START = flags.DEFINE_bool("document_start", True, "Whether the prompt begins a document, as in training.")
CONTEXT = flags.DEFINE_integer("context", None, "Tokens the cache has room for; default: prompt and continuation.")
CAPACITY = flags.DEFINE_integer("capacity", None, "Number of segments whose states are cached; default: all.")
FULL_CACHE = flags.DEFINE_enum("full", "error", FULL, "What to do when the cache is full.")
CACHE_DTYPE = flags.DEFINE_string(
  "cache_dtype", None, "Dtype of cached states: float32, bfloat16, int8; default: the model's."
)
CACHE_MEMORY = flags.DEFINE_enum(
  "cache_memory", "device", decode.MEMORIES, "Where to keep cached states; host: for ssc."
)
SAVE = cli.path_flag("save_prompt", None, "Folder to save the prompt's cache in.")
LOAD = cli.path_flag("load_prompt", None, "Folder of a saved prompt, which --prompt continues.")

_CACHE_FLAGS = {
  "tokens": CONTEXT,
  "capacity": CAPACITY,
  "full": FULL_CACHE,
  "dtype": CACHE_DTYPE,
  "memory": CACHE_MEMORY,
}


def main(_: list[str]) -> None:
  """Generates as the flags say."""
  when = " when it was saved" if LOAD.value else ""
  with cli.naming({f"cache.{field}": f"--{flag.name}{when}" for field, flag in _CACHE_FLAGS.items()}):
    _generate()


def _generate() -> None:
  model = trained.load(outputs.workdir(WORKDIR.value), cli.overrides(CONFIG), step=STEP.value)
  config, data = model.config.model, model.config.data
  if not data.has_text:
    raise ConfigError(
      f"this run was trained on the symbols of data.source={data.source}, which stand for no text, so it cannot be "
      "prompted. mc_jax.evaluate --tasks= tests it on what it was trained on"
    )
  tokenizer = model.tokenizer()
  prompt = _prompt(tokenizer, data.has_documents)
  mesh = model.mesh if model.mesh.size > 1 else None
  decoder = Decoder(config, state.graph(model.config), model.params, _cache(len(prompt)), mesh)
  request = Request(prompt, MAX_TOKENS.value, TEMPERATURE.value, TOP_K.value, TOP_P.value, SEED.value)
  stops = [cli.typed("stop", words) for words in STOP.value]
  rows = continuing.run(decoder, tokenizer, request, stops, SAMPLES.value, saved=LOAD.value, save=SAVE.value)
  print(report.table({"model": f"{config.label}, step {model.step:,}", **rows}, "speed"), file=sys.stderr)


def _prompt(tokenizer: tokenizers.Tokenizer, documents: bool) -> np.ndarray:
  """The prompt's ids, preceded by a separator if it begins a document and the run was trained on documents."""
  if PROMPT.value is not None and PROMPT_FILE.value is not None:
    raise ConfigError("--prompt and --prompt_file are both given: use one")
  if PROMPT.value is not None:
    words = cli.typed("prompt", PROMPT.value)
  else:
    try:
      file = PROMPT_FILE.value
      words = sys.stdin.read() if file is None else epath.Path(file).read_text(encoding="utf-8")
    except UnicodeError as error:
      raise ConfigError(f"{file or 'standard input'} is not UTF-8: {error}") from error
  if not words and not LOAD.value:
    raise ConfigError("the prompt is empty: give --prompt, --prompt_file or text on standard input")
  ids = tokenizer.encode([words])[0]
  begins = documents and DOCUMENT_START.value and not LOAD.value
  return np.concatenate([[tokenizer.separator], ids]).astype(np.int32) if begins else ids


def _cache(prompt: int) -> CacheConfig:
  """The cache that the flags describe, or that of the saved prompt."""
  if LOAD.value:
    if given := [flag.name for flag in _CACHE_FLAGS.values() if flag.present]:
      raise ConfigError(f"--{given[0]} cannot be changed with --load_prompt: it is as it was saved")
    return prompts.cache_config(LOAD.value)
  tokens = prompt + MAX_TOKENS.value if CONTEXT.value is None else CONTEXT.value
  return CacheConfig(tokens, CAPACITY.value, FULL_CACHE.value, CACHE_DTYPE.value, CACHE_MEMORY.value)


if __name__ == "__main__":
  flags.mark_flag_as_required("workdir")
  cli.run(main, CONFIG, verbosity=logging.ERROR)
