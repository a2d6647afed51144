"""Continues a prompt with a trained model: `python -m mc_jax.generate --workdir=RUN --prompt="Once upon a time"`.

The text comes as it is made, on standard output; what it took, on standard error. A long document is read once and
asked many times with --save_prompt and --load_prompt. Fields of the run's configuration that leave the parameters as
they are can be changed, such as --config.model.memory.after_training=moving_average.
"""

import dataclasses
import sys

import mc_jax.xla_flags  # noqa: F401  isort: skip  (before jax)
import jax
import numpy as np
from absl import flags, logging
from etils import epath

from mc_jax import cli
from mc_jax.data import tokenizers
from mc_jax.errors import ConfigError
from mc_jax.inference import Decoder, Request, generation, prompts, text
from mc_jax.memory import decode
from mc_jax.models import CacheConfig
from mc_jax.models.cache import FULL
from mc_jax.training import outputs, report, state, trained

CONFIG = cli.overrides_flag()
WORKDIR = cli.path_flag("workdir", None, "folder of a run of mc_jax.train, or gs://BUCKET/FOLDER")
STEP = flags.DEFINE_integer("step", None, "of the checkpoint; default: the newest")
PROMPT = flags.DEFINE_string("prompt", None, "text to continue; default: standard input, UTF-8")
PROMPT_FILE = cli.path_flag("prompt_file", None, "file of the text to continue, UTF-8")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 200, "of the continuation")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0: always the likeliest token")
TOP_K = flags.DEFINE_integer("top_k", 0, "draw from so many of the likeliest tokens; 0: all")
TOP_P = flags.DEFINE_float("top_p", 1.0, "draw from the likeliest tokens that together have this probability")
SEED = flags.DEFINE_integer("seed", 0, "of the draws; sample i has seed + i")
SAMPLES = flags.DEFINE_integer("samples", 1, "continuations, as one batch", lower_bound=1)
STOP = flags.DEFINE_multi_string("stop", [], "text at which the continuation ends; may be given several times")
WHOLE = flags.DEFINE_bool("document_start", True, "the prompt begins a document, as in training")
CONTEXT = flags.DEFINE_integer("context", None, "tokens that the cache is for; default: prompt and continuation")
CAPACITY = flags.DEFINE_integer("capacity", None, "segments whose states are kept; default: all of them")
FULL_CACHE = flags.DEFINE_enum("full", "error", FULL, "what happens when more states are to be kept")
CACHE_DTYPE = flags.DEFINE_string(
  "cache_dtype", None, "of cached states: float32, bfloat16, int8; default: the model's"
)
CACHE_MEMORY = flags.DEFINE_enum("cache_memory", "device", decode.MEMORIES, "where cached states lie; host: for ssc")
SAVE = cli.path_flag("save_prompt", None, "folder to save the prompt's cache in")
LOAD = cli.path_flag("load_prompt", None, "folder of a saved prompt, which --prompt continues")


def main(_: list[str]) -> None:
  """Generates as the flags say."""
  flag_of = {"tokens": CONTEXT, "capacity": CAPACITY, "full": FULL_CACHE, "dtype": CACHE_DTYPE, "memory": CACHE_MEMORY}
  when = " when it was saved" if LOAD.value else ""
  with cli.naming({f"cache.{field}": f"--{flag.name}{when}" for field, flag in flag_of.items()}):
    _generate()


def _generate() -> None:
  model = trained.load(outputs.workdir(WORKDIR.value), cli.overrides(CONFIG), step=STEP.value)
  data = model.config.data
  if not data.has_text:
    raise ConfigError(
      f"this run was trained on the symbols of data.source={data.source}, which stand for no text: there is nothing to "
      "prompt it with. mc_jax.evaluate --tasks= asks it for what it was trained on"
    )
  tokenizer = model.tokenizer()
  prompt = _prompt(tokenizer, data.has_documents)
  mesh = model.mesh if model.mesh.size > 1 else None
  decoder = Decoder(model.config.model, state.graph(model.config), model.params, _cache(len(prompt)), mesh)

  stops = [cli.typed("stop", words) for words in STOP.value]
  stop = text.stops(tokenizer, stops)
  requests = [
    Request(prompt, MAX_TOKENS.value, TEMPERATURE.value, TOP_K.value, TOP_P.value, SEED.value + i, stop)
    for i in range(SAMPLES.value)
  ]
  if SAVE.value:
    prompts.require_new(SAVE.value)
  loaded = prompts.load(LOAD.value, decoder) if LOAD.value else None
  decoder.check(requests[:1], loaded)
  with generation.Stopwatch() as reading:
    if loaded is None:
      logits, cache = decoder.prefill([prompt])
    else:
      logits, cache = decoder.extend(loaded[1], [prompt], loaded[0]) if len(prompt) else loaded
    jax.block_until_ready(cache)
  if SAVE.value:
    prompts.save(SAVE.value, decoder, logits, cache)
  if SAMPLES.value > 1:
    logits, cache = generation.repeat(logits, cache, SAMPLES.value)
  size = generation.cache_bytes(cache)

  requests = [dataclasses.replace(request, prompt=prompt[:0]) for request in requests]
  streams = [text.Stream(tokenizer.decode, stops) for _ in requests]
  made = 0
  with generation.Stopwatch() as writing:
    for block, added in text.follow(decoder.generate(requests, (logits, cache)), streams, tokenizer):
      made += int((block != generation.NOTHING).sum())
      if SAMPLES.value == 1:
        print(added[0], end="", flush=True)
  for i, stream in enumerate(streams):
    print(stream.rest() if SAMPLES.value == 1 else f"--- {i}\n{stream.text()}{stream.rest()}", flush=True)
  rows = {
    "model": f"{model.config.model.label}, step {model.step:,}",
    "prompt": f"{len(prompt):,} tokens, {len(prompt) / max(reading.seconds, 1e-9):,.0f} tokens/s",
    "continuation": f"{made:,} tokens, {made / max(writing.seconds, 1e-9):,.0f} tokens/s",
    "compilation": f"{reading.compilation + writing.compilation:.1f} s, not in these",
    "cache": f"{size:,} bytes" + (f", saved in {SAVE.value}" if SAVE.value else ""),
  }
  print(report.table(rows, "what it took"), file=sys.stderr)


def _prompt(tokenizer: tokenizers.Tokenizer, documents: bool) -> np.ndarray:
  """The prompt's ids; behind a separator where it begins a document and the run was trained on documents."""
  if PROMPT.value is not None and PROMPT_FILE.value is not None:
    raise ConfigError("--prompt and --prompt_file are both given: use one")
  if PROMPT.value is not None:
    words = cli.typed("prompt", PROMPT.value)
  else:
    try:
      words = (
        sys.stdin.read() if PROMPT_FILE.value is None else epath.Path(PROMPT_FILE.value).read_text(encoding="utf-8")
      )
    except UnicodeError as error:
      raise ConfigError(f"{PROMPT_FILE.value or 'standard input'} is not UTF-8: {error}") from error
  if not words and not LOAD.value:
    raise ConfigError("the prompt is empty: give --prompt, --prompt_file or text on standard input")
  ids = tokenizer.encode([words])[0]
  begins = documents and WHOLE.value and not LOAD.value
  return np.concatenate([[tokenizer.separator], ids]).astype(np.int32) if begins else ids


def _cache(prompt: int) -> CacheConfig:
  """What the flags say of the cache, or what a saved prompt has."""
  if LOAD.value:
    given = [flag.name for flag in (CONTEXT, CAPACITY, FULL_CACHE, CACHE_DTYPE, CACHE_MEMORY) if flag.present]
    if given:
      raise ConfigError(f"--{given[0]} cannot be changed with --load_prompt: it is as it was saved")
    return prompts.cache_config(LOAD.value)
  tokens = prompt + MAX_TOKENS.value if CONTEXT.value is None else CONTEXT.value
  return CacheConfig(tokens, CAPACITY.value, FULL_CACHE.value, CACHE_DTYPE.value, CACHE_MEMORY.value)


if __name__ == "__main__":
  flags.mark_flag_as_required("workdir")
  cli.run(main, CONFIG, verbosity=logging.ERROR)
