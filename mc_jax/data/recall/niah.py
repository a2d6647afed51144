"""A needle in a haystack (NIAH), as RULER defines it (arXiv:2404.06654).

Sentences of the form "One of the special magic numbers for amber-harbor is: 1234567." are hidden in a haystack, and at
the end one is asked for. The haystack is as long as fits. `TASKS` has RULER's eight tasks by its names without `niah_`;
S-NIAH-1, -2, -3 are single_1 (a passkey in noise), single_2 (a number in prose), single_3 (a uuid in prose).
"""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mc_jax.data.recall import lexicon, prose
from mc_jax.errors import ConfigError

Encode = Callable[[str], Sequence[int]]  # the tokens of a text, no special ones added

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
PROMPT = (
  "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
  "I will quiz you about the {kind} afterwards.\n{context}\n"
  "What are all the special magic {kind} for {query} mentioned in the provided text? "
  "The special magic {kind} for {query} mentioned in the provided text are"
)
PROMPT_OF_ONE = (
  "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
  "I will quiz you about the {kind} afterwards.\n{context}\n"
  "What is the special magic {kind} for {query} mentioned in the provided text? "
  "The special magic {kind} for {query} mentioned in the provided text is"
)
DEPTHS = np.round(np.linspace(0, 100, 40)) / 100  # where needles lie in prose: parts of its sentences before them
_SENTENCE_END = re.compile(r"""[.!?]["')\]]*$""")


@dataclasses.dataclass(frozen=True)
class Needles:
  """What is hidden, in what, and how much of it is asked for."""

  haystack: str  # "noise": NOISE over and over; "prose"; "needles": needles that nothing asks for
  keys: str = "words"  # or "uuids"
  values: str = "numbers"  # or "uuids"
  num_keys: int = 1
  num_values: int = 1  # of each key
  num_queries: int = 1  # keys asked for


TASKS = {
  "single_1": Needles("noise"),
  "single_2": Needles("prose"),
  "single_3": Needles("prose", values="uuids"),
  "multikey_1": Needles("prose", num_keys=4),
  "multikey_2": Needles("needles"),
  "multikey_3": Needles("needles", keys="uuids", values="uuids"),
  "multivalue": Needles("prose", num_values=4),
  "multiquery": Needles("prose", num_keys=4, num_queries=4),
}


@dataclasses.dataclass(frozen=True)
class NIAHConfig:
  """Which of RULER's tasks, and how they fill a row."""

  tasks: tuple[str, ...] = ("single_1",)  # names in TASKS; of several, each row draws one
  answer_tokens: int = 0  # kept free for the answer, which takes more if it must; RULER: 128
  random_start: bool = True  # prose starts at a random word, and after its end at its start; RULER: at its start

  def __post_init__(self):
    object.__setattr__(self, "tasks", tuple(self.tasks))  # JSON has only lists

  @property
  def vocab_size(self) -> None:
    """Ids are the tokenizer's."""

  def problems(self, prefix: str = "niah", length: int | None = None) -> list[str]:
    """Every setting that cannot work, one line each. What fits `length` depends on the tokenizer: `row` says it."""
    found = []
    unknown = [task for task in self.tasks if task not in TASKS]
    if unknown or not self.tasks:
      found.append(f"{prefix}.tasks must be one or more of {', '.join(TASKS)}, got {self.tasks!r}")
    if self.answer_tokens < 0:
      found.append(f"{prefix}.answer_tokens must be at least 0, got {self.answer_tokens!r}")
    elif length is not None and self.answer_tokens >= length:
      found.append(f"{prefix}.answer_tokens must be less than data.length={length}, got {self.answer_tokens!r}")
    return found


class Example(NamedTuple):
  """A question about a haystack, for training and for scoring what a model generates."""

  task: str
  prompt: str
  answers: tuple[str, ...]  # in the order of the queries, then of the text; RULER scores the share found in the output
  tokens: np.ndarray  # of the prompt, int32
  answer_tokens: np.ndarray  # of " " and the answers with ", " between them, int32
  depths: tuple[float, ...]  # of all needles: parts of the haystack before them, from 0 to 1


def utf8(text: str) -> np.ndarray:
  """Bytes as tokens."""
  return np.frombuffer(text.encode(), np.uint8)


def example(
  config: NIAHConfig,
  length: int,
  rng: np.random.Generator,
  *,
  encode: Encode = utf8,
  words: Sequence[str] | None = None,
  depth: float | None = None,
) -> Example:
  """One question: its prompt and the tokens kept for the answer are at most `length`, one unit of haystack more is not.

  A unit is a word of prose, NOISE, or a needle that nothing asks for.

  Args:
    encode: of the tokenizer.
    words: the prose, such as `prose.words` of the user's texts; default: `prose.embedded`.
    depth: where the needle lies, from 0 to 1, for tasks with one; default: drawn, in prose from DEPTHS.

  Raises:
    ConfigError: what `NIAHConfig.problems` lists, or `length` does not even hold the needles and the question.
  """
  if found := config.problems(length=length):
    raise ConfigError("\n".join(found))
  name = config.tasks[rng.integers(len(config.tasks))]
  task = TASKS[name]
  words = prose.embedded() if words is None else words

  named = _names(task.keys, task.num_keys, rng)
  hidden = [(key, value) for key in named for value in _values(task.values, task.num_values, rng)]
  hidden = [hidden[i] for i in rng.permutation(len(hidden))]
  needles = [NEEDLE.format(kind=task.values, key=key, value=value) for key, value in hidden]
  depths = _depths(task, len(needles), depth, rng)
  asked = [named[i] for i in rng.choice(task.num_keys, task.num_queries, replace=False)]
  answers = tuple(value for query in asked for key, value in hidden if key == query)
  answer = encode(" " + ", ".join(answers))
  template, kind = (PROMPT_OF_ONE, task.values.removesuffix("s")) if len(answers) == 1 else (PROMPT, task.values)

  room = length - max(config.answer_tokens, len(answer))
  units = _units(task, named, words, max(0, room), config.random_start, encode, rng)

  def prompt(size: int) -> str:
    prosaic = task.haystack == "prose"
    pieces = _sentences(units[:size]) if prosaic else units[:size]
    places = [int(len(pieces) * part) for part in depths]
    for place, needle in reversed(list(zip(places, needles, strict=True))):
      pieces.insert(place, needle)
    return template.format(kind=kind, query=_listed(asked), context=(" " if prosaic else "\n").join(pieces))

  size, tokens = _largest(lambda size: encode(prompt(size)), len(units), room)
  if len(tokens) > room:
    raise ConfigError(
      f"data.length={length} is too short for {name}: without any haystack its prompt is {len(tokens)} tokens, and "
      f"{length - room} are kept for the answer; use at least {len(tokens) + length - room}"
    )
  return Example(name, prompt(size), answers, np.asarray(tokens, np.int32), np.asarray(answer, np.int32), depths)


def row(
  config: NIAHConfig,
  length: int,
  rng: np.random.Generator,
  *,
  encode: Encode = utf8,
  words: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
  """An `example` with its answer: tokens int32, targets int32, weights float32, [length] each; zeros after it.

  Raises:
    ConfigError: as `example`.
  """
  asked = example(config, length, rng, encode=encode, words=words)
  ids = np.concatenate([asked.tokens, asked.answer_tokens])
  tokens, targets, weights = np.zeros(length, np.int32), np.zeros(length, np.int32), np.zeros(length, np.float32)
  tokens[: len(ids)] = ids
  targets[: len(ids) - 1] = ids[1:]
  weights[len(asked.tokens) - 1 : len(ids) - 1] = 1
  return {"tokens": tokens, "targets": targets, "weights": weights}


def _names(kind: str, count: int, rng: np.random.Generator, replace: bool = False) -> list[str]:
  """What needles are called: distinct words, unless `replace`, or uuids."""
  if kind == "uuids":
    return _values(kind, count, rng)
  nouns = len(lexicon.NOUNS)
  numbers = rng.choice(len(lexicon.ADJECTIVES) * nouns, count, replace=replace)
  return [f"{lexicon.ADJECTIVES[i // nouns]}-{lexicon.NOUNS[i % nouns]}" for i in numbers]


def _values(kind: str, count: int, rng: np.random.Generator) -> list[str]:
  """Numbers of seven digits, or uuids."""
  if kind == "uuids":
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]
  return [str(number) for number in rng.integers(10**6, 10**7, size=count)]


def _depths(task: Needles, count: int, depth: float | None, rng: np.random.Generator) -> tuple[float, ...]:
  if depth is None:
    drawn = rng.choice(DEPTHS, count, replace=False) if task.haystack == "prose" else rng.random(count)
    return tuple(sorted(drawn.tolist()))
  if count > 1 or not 0 <= depth <= 1:
    raise ValueError(f"depth must be from 0 to 1, for a task with one needle; got {depth!r} with {count} needle(s)")
  return (depth,)


def _units(
  task: Needles,
  named: list[str],
  words: Sequence[str],
  room: int,
  random_start: bool,
  encode: Encode,
  rng: np.random.Generator,
) -> list[str]:
  """Pieces of haystack, as many as `room` tokens may take."""
  if task.haystack == "prose":
    start = int(rng.integers(len(words))) if random_start else 0
    return [words[(start + i) % len(words)] for i in range(room)]
  if task.haystack == "noise":
    return [NOISE] * (room // len(encode(NOISE)) + 1)
  # Lines differ by little in length: twice as many as there is room for ones like the first are enough.
  (key,), (value,) = _names(task.keys, 1, rng), _values(task.values, 1, rng)
  count = 2 * room // len(encode(NEEDLE.format(kind=task.values, key=key, value=value))) + 1
  keys, values = _names(task.keys, count, rng, replace=True), _values(task.values, count, rng)
  return [
    NEEDLE.format(kind=task.values, key=key, value=value)
    for key, value in zip(keys, values, strict=True)
    if key not in named  # nothing but the needle answers
  ]


def _sentences(words: Sequence[str]) -> list[str]:
  ends = [i + 1 for i, word in enumerate(words) if _SENTENCE_END.search(word)]
  starts = [0, *ends]
  return [" ".join(words[a:b]) for a, b in zip(starts, [*ends, len(words)], strict=True) if a < b]


def _largest(tokens_of: Callable[[int], Sequence[int]], limit: int, room: int) -> tuple[int, Sequence[int]]:
  """The largest size up to `limit` with at most `room` tokens, and these; size 0 even if its tokens are more.

  A prompt's tokens are nearly linear in its size: interpolation takes a few steps where halving takes many, and every
  step costs the tokenizer a whole prompt.
  """
  size, tokens = 0, tokens_of(0)
  least, too_large, by = len(tokens), limit + 1, min(limit, 32)
  probes = 0
  while len(tokens) <= room and too_large - size > 1:
    probes += 1
    probe = min(max(size + by, size + 1), too_large - 1) if probes < 12 else (size + too_large) // 2
    found = tokens_of(probe)
    if len(found) <= room:
      size, tokens = probe, found
    else:
      too_large = probe
    by = (room - len(tokens)) * probe // max(1, len(found) - least)
  return size, tokens


def _listed(names: list[str]) -> str:
  """RULER's enumeration: "a", "a, and b", "a, b, and c"."""
  return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
