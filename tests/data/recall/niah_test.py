import re

import numpy as np
import pytest

from mc_jax.data.recall import NIAHConfig, niah, prose
from mc_jax.errors import ConfigError

SEEDS = range(3)
LENGTH = 1500
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.(?=\s)")
NUMBER = re.compile(r"\d{7}")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def pieces(text: str) -> np.ndarray:
  """A tokenizer whose tokens are not letters: words and white space, as numbers."""
  return np.array([hash_of(piece) for piece in re.findall(r"\s+|\w{1,4}|[^\w\s]", text)], np.int32)


def hash_of(piece: str) -> int:
  return sum(ord(letter) * 31**i for i, letter in enumerate(piece)) % 5000


@pytest.mark.parametrize("task", niah.TASKS)
@pytest.mark.parametrize("seed", SEEDS)
def test_needles_are_as_ruler_has_them(task, seed):
  spec = niah.TASKS[task]
  asked = niah.example(NIAHConfig(tasks=(task,)), LENGTH, np.random.default_rng(seed))
  context, question = asked.prompt.split("\n", 1)[1].rsplit("\n", 1)
  needles = [(key, value) for _, key, value in NEEDLE.findall(context + "\n")]
  queries = re.search(r" for (.*?) mentioned", question)[1].replace(", and ", ", ").split(", ")
  assert len(asked.depths) == spec.num_keys * spec.num_values and len(set(queries)) == spec.num_queries

  # Exactly the answers are hidden under the names that are asked for.
  found = {query: [value for key, value in needles if key == query] for query in queries}
  assert all(len(values) == spec.num_values for values in found.values())
  assert asked.answers == tuple(value for query in queries for value in found[query])
  assert all((UUID if spec.values == "uuids" else NUMBER).fullmatch(value) for _, value in needles)
  assert all(bool(UUID.fullmatch(key)) == (spec.keys == "uuids") for key, _ in needles)

  rest = NEEDLE.sub("", context + "\n")
  if spec.haystack == "prose":
    assert len(needles) == spec.num_keys * spec.num_values
    text = " ".join(prose.embedded() * 2)
    assert " ".join(rest.split()) in text
  elif spec.haystack == "noise":
    assert len(needles) == 1 and set(rest.split("\n")) == {niah.NOISE, ""}
  else:
    assert len(needles) > 3 and not rest.strip()  # the haystack is needles

  one = len(asked.answers) == 1
  assert asked.prompt.startswith("A special magic" if one else "Some special magic")
  kind = spec.values[:-1] if one else spec.values
  assert f"I will quiz you about the {kind} afterwards.\n" in asked.prompt
  assert asked.prompt.endswith("mentioned in the provided text is" if one else "mentioned in the provided text are")


@pytest.mark.parametrize("encode", [niah.utf8, pieces])
@pytest.mark.parametrize("task", niah.TASKS)
def test_a_row_is_the_example_and_weighs_the_answer_alone(task, encode):
  config = NIAHConfig(tasks=(task,))
  for seed in SEEDS:
    asked = niah.example(config, LENGTH, np.random.default_rng(seed), encode=encode)
    row = niah.row(config, LENGTH, np.random.default_rng(seed), encode=encode)
    assert {name: (array.shape, array.dtype.name) for name, array in row.items()} == {
      "tokens": ((LENGTH,), "int32"),
      "targets": ((LENGTH,), "int32"),
      "weights": ((LENGTH,), "float32"),
    }
    start, end = len(asked.tokens), len(asked.tokens) + len(asked.answer_tokens)
    np.testing.assert_array_equal(row["tokens"][:start], encode(asked.prompt))
    np.testing.assert_array_equal(row["targets"][row["weights"] == 1], encode(" " + ", ".join(asked.answers)))
    np.testing.assert_array_equal(np.flatnonzero(row["weights"]), np.arange(start - 1, end - 1))
    np.testing.assert_array_equal(row["targets"][: end - 1], row["tokens"][1:end])
    assert not row["tokens"][end:].any() and not row["targets"][end - 1 :].any()


@pytest.mark.parametrize(("task", "unit"), [("single_1", len(niah.NOISE) + 1), ("single_2", 20), ("multikey_3", 120)])
@pytest.mark.parametrize("answer_tokens", [0, 128])
def test_no_more_haystack_would_fit(task, unit, answer_tokens):
  """What is left is less than one more unit of haystack, a word of at most 20 bytes in prose."""
  for length in range(800, 1600, 37):
    config = NIAHConfig(tasks=(task,), answer_tokens=answer_tokens)
    asked = niah.example(config, length, np.random.default_rng(length))
    left = length - len(asked.tokens) - max(answer_tokens, len(asked.answer_tokens))
    assert 0 <= left < unit


@pytest.mark.parametrize("slope", [1, 3, 7.7])
@pytest.mark.parametrize("room", [0, 5, 50, 999, 2000])
def test_the_largest_size_is_found(slope, room):
  counts = np.cumsum(np.random.default_rng(0).integers(1, int(2 * slope) + 1, size=401))

  def tokens_of(size: int) -> np.ndarray:
    probed.append(size)
    return np.zeros(counts[size])

  probed = []
  size, tokens = niah._largest(tokens_of, 400, room)
  assert size == max(0, np.searchsorted(counts, room, side="right") - 1) and len(tokens) == counts[size]
  assert len(probed) <= 20


def test_rows_are_a_function_of_the_seed():
  config = NIAHConfig(tasks=tuple(niah.TASKS))
  first, again, other = (niah.row(config, LENGTH, np.random.default_rng(seed))["tokens"] for seed in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_several_tasks_are_drawn():
  config = NIAHConfig(tasks=("single_1", "multivalue"))
  drawn = [niah.example(config, LENGTH, np.random.default_rng(seed)).task for seed in range(20)]
  assert set(drawn) == set(config.tasks)


@pytest.mark.parametrize("task", ["single_1", "single_2", "multikey_2"])
def test_needles_lie_where_they_are_told(task):
  def place(depth):
    asked = niah.example(NIAHConfig(tasks=(task,)), 24_000, np.random.default_rng(0), depth=depth)
    return asked.prompt.index(f"is: {asked.answers[0]}.") / len(asked.prompt)

  places = [place(depth) for depth in (0, 0.5, 1)]
  assert places[0] < 0.1 and 0.35 < places[1] < 0.65 and places[2] > 0.85
  with pytest.raises(ValueError, match="one needle"):
    niah.example(NIAHConfig(tasks=("multikey_1",)), 4096, np.random.default_rng(0), depth=0.5)


def test_nothing_else_answers(monkeypatch):
  """Of four names, three are left for the needles that nothing asks for."""
  monkeypatch.setattr(niah.lexicon, "ADJECTIVES", ("red", "blue"))
  monkeypatch.setattr(niah.lexicon, "NOUNS", ("owl", "leaf"))
  for seed in SEEDS:
    asked = niah.example(NIAHConfig(tasks=("multikey_2",)), LENGTH, np.random.default_rng(seed))
    keys = [key for _, key, _ in NEEDLE.findall(asked.prompt)]
    assert len(keys) > 10 and len(set(keys)) == 4
    assert 1 in (keys.count(key) for key in set(keys))


def test_depths_in_prose_are_rulers_forty():
  seen = {
    depth
    for seed in range(60)
    for depth in niah.example(NIAHConfig(tasks=("multikey_1",)), 1000, np.random.default_rng(seed)).depths
  }
  forty = {round(100 * i / 39) / 100 for i in range(40)}
  assert seen <= forty and len(seen) > 30 and {0, 1} <= seen


def test_prose_is_the_users():
  """Any texts; their start first, if so told; around again where they end; braces are only braces."""
  words = prose.words([b"Erst kommt {das}. ", "Dann \n kommt jenes. \u00c4hnlich."])
  assert words == ("Erst", "kommt", "{das}.", "Dann", "kommt", "jenes.", "Ähnlich.")
  asked = niah.example(NIAHConfig(tasks=("single_2",), random_start=False), 500, np.random.default_rng(0), words=words)
  text = NEEDLE.sub("", asked.prompt.split("\n")[1] + " ")
  assert text.split()[:9] == [*words, *words[:2]]
  assert prose.words(iter(["a b", "c d"]), limit=3) == ("a", "b", "c")
  with pytest.raises(ConfigError, match="no word"):
    prose.words([" \n", b""])


@pytest.mark.parametrize(
  ("config", "length", "field"),
  [
    (NIAHConfig(tasks=("single_4",)), 1000, r"niah\.tasks must be one or more of single_1, .*multiquery.*single_4"),
    (NIAHConfig(tasks=()), 1000, r"niah\.tasks"),
    (NIAHConfig(answer_tokens=-1), 1000, r"niah\.answer_tokens"),
    (NIAHConfig(answer_tokens=1000), 1000, r"niah\.answer_tokens must be less than data\.length=1000"),
  ],
)
def test_what_cannot_be_is_refused_by_name(config, length, field):
  with pytest.raises(ConfigError, match=field):
    niah.row(config, length, np.random.default_rng(0))


@pytest.mark.parametrize("task", niah.TASKS)
def test_a_length_too_short_says_which_is_enough(task):
  config = NIAHConfig(tasks=(task,))
  for length in (3, 200):
    with pytest.raises(ConfigError, match=rf"data\.length={length} is too short for {task}: .* use at least") as error:
      niah.row(config, length, np.random.default_rng(0))
  enough = int(str(error.value).split()[-1])
  assert niah.row(config, enough + 100, np.random.default_rng(0))["weights"].any()
