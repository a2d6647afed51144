"""Continues one prompt, several times if asked, and prints the text as it is generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mc_jax.data.tokenizers import Tokenizer
from mc_jax.inference import generation, prompts, text
from mc_jax.inference.generation import Decoder, Request
from mc_jax.models import cache as cache_lib


def run(
  decoder: Decoder,
  tokenizer: Tokenizer,
  request: Request,
  stops: Sequence[str] = (),
  samples: int = 1,
  *,
  saved: str | None = None,
  save: str | None = None,
) -> dict[str, str]:
  """Prints the continuations of a prompt, and returns rows about their speed and the cache's size.

  A single continuation is printed as it is generated; several are printed at the end.

  Args:
    decoder: The model.
    tokenizer: The tokenizer of the model's run.
    request: The prompt and how to continue it; sample i has the seed request.seed + i.
    stops: Texts at which a continuation ends.
    samples: The number of continuations.
    saved: Folder of a saved prompt, which request.prompt continues; None: request.prompt is the beginning.
    save: Folder to save the prompt's cache in.

  Raises:
    ConfigError: A request that cannot be met, a folder that exists, or a prompt saved by another model.
  """
  stop = text.stops(tokenizer, stops)
  requests = [dataclasses.replace(request, seed=request.seed + i, stop=stop) for i in range(samples)]
  if save:
    prompts.require_new(save)
  start = prompts.load(saved, decoder) if saved else None
  decoder.check(requests[:1], start)
  with generation.Stopwatch() as reading:
    if start is None:
      logits, cache = decoder.prefill([request.prompt])
    else:
      logits, cache = decoder.extend(start[1], [request.prompt], start[0]) if len(request.prompt) else start
    jax.block_until_ready(cache)
  if save:
    prompts.save(save, decoder, logits, cache)
  if samples > 1:
    logits, cache = generation.repeat(logits, cache, samples)
  size = cache_lib.nbytes(cache.slots)
  requests = [dataclasses.replace(request, prompt=np.zeros(0, np.int32)) for request in requests]
  streams, count = [text.Stream(tokenizer.decode, stops) for _ in requests], 0
  with generation.Stopwatch() as writing:
    for block, added in text.follow(decoder.generate(requests, (logits, cache)), streams, tokenizer):
      count += int((block != generation.NOTHING).sum())
      if samples == 1:
        print(added[0], end="", flush=True)
  for i, stream in enumerate(streams):
    print(stream.rest() if samples == 1 else f"--- {i}\n{stream.text()}{stream.rest()}", flush=True)
  length = len(request.prompt)
  return {
    "prompt": f"{length:,} tokens, {length / max(reading.seconds, 1e-9):,.0f} tokens/s",
    "continuation": f"{count:,} tokens, {count / max(writing.seconds, 1e-9):,.0f} tokens/s",
    "compilation": f"{reading.compilation + writing.compilation:.1f} s, not included above",
    "cache": f"{size:,} bytes" + (f", saved in {save}" if save else ""),
  }
