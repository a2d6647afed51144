"""Decodes millions of tokens with a bounded cache, and measures memory use and drift from prefill's states.

  JAX_PLATFORMS=cpu python -m mc_jax.bench.long_stream --tokens=10000000 --json=docs/faults/long_stream.json

Each of COMBINATIONS reads that many tokens, as ROWS streams side by side, in compiled blocks of steps; ten minutes on
one core. A block's tokens come from a counter-based generator: random, with keys of unit length and gates near their
initial values. A row has tokens / ROWS of them, and ends in the middle of a segment and of a chunk.

After every block the cache is compared, by each array's largest difference relative to its largest value, with

* carry="independent": a fresh prefill of the segments that the cache still holds. Answers, online state, cached states
  and summaries.
* carry="checkpoint": prefill's pass over the whole stream in float64, continued from block to block. Online state and
  cached states. "pass" is the drift of the same pass in float32.

Exits with 1 if a difference exceeds its bound (`bound`), the live arrays take more bytes after one block than after
another, or the process grows by more than GROWTH. If it is stopped, the same command resumes from the file, which has
the totals of each finished stream and some of its blocks (`summary`).
"""

import functools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from mc_jax import cli, memory, storage
from mc_jax.memory import decode, segments, xla
from mc_jax.memory.tokens import Tokens, heads_first

_TOKENS = flags.DEFINE_integer("tokens", 10_000_000, "Tokens that each combination reads.", lower_bound=1)
_JSON = cli.json_flag()

ROWS, HEADS, HEAD_DIM = 16, 2, 8
SEGMENT, CHUNK, CAPACITY = 64, 16, 4
BLOCK = 64 * SEGMENT
COMBINATIONS = [
  ("titans", "ssc", "independent", "float32"),
  ("titans", "grm", "checkpoint", "float32"),
  ("titans", "grm", "checkpoint", "float64"),
  ("linear", "ssc", "checkpoint", "float32"),
]
NAMES = ("rule", "aggregation", "carry", "dtype")
ERRORS = ("state", "cached", "answers", "pass")
GROWTH = 32.0  # MiB of resident memory, about the size of a block's tokens


def options_of(rule, aggregation, carry):
  """A layer whose cache holds CAPACITY segments: a new one replaces the oldest."""
  return decode.Options(
    memory.rules.get(rule, chunk=CHUNK), memory.segments.constant(SEGMENT), aggregation, carry, capacity=CAPACITY
  )


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def tokens(rule, key, rows, length):
  """Random tokens of rows x length, float32."""
  *keys, gate_key = jax.random.split(key, 5)
  q, k, v, u = (jax.random.normal(key, (rows, length, HEADS, HEAD_DIM), jnp.float32) for key in keys)
  unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k)]
  noise = 0.5 * jax.random.normal(gate_key, (len(rule.gates), rows, length, HEADS), jnp.float32)
  starts = rule.gate_init(SEGMENT)
  gates = {
    name: start.maximum * jax.nn.sigmoid(start.bias + x) for (name, start), x in zip(starts.items(), noise, strict=True)
  }
  return Tokens(*unit, v, u, gates)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def steps(options, x, init, cache):
  """Steps through a block of tokens; returns answers [rows, length, heads, head_dim] and the cache."""

  def step(cache, token):
    y, cache = decode.step(options, token, init, cache)
    return cache, y[:, 0]

  cache, y = jax.lax.scan(step, cache, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0)[:, :, None], x))
  return jnp.moveaxis(y, 0, 1), cache


@functools.partial(jax.jit, static_argnums=0)
def prefill(options, x, init, lengths):
  """`decode.prefill`, compiled."""
  return decode.prefill(options, x, init, lengths=lengths)


@functools.partial(jax.jit, static_argnums=0)
def write_block(rule, x, init, start):
  """Prefill's pass over a block; returns the last state and the memories at the ends of segments."""
  x = heads_first(x)
  lengths = segments.constant(SEGMENT).lengths(x.k.shape[2])
  nothing = x._replace(q=x.k[..., :0])
  done = xla.write(rule, init, nothing, lengths, read=lambda _, q: q, carries=True, side_by_side=1, start=start)
  return done.end, done.states.memory


def error(actual, expected):
  """The largest difference of two trees, relative to each array's largest value; NaN if any is."""
  pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  return float(np.max([np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in pairs]))


def in_order(cache):
  """(memories, summaries) of the cached segments, oldest first."""
  last = (int(cache.position[0]) - 1) // SEGMENT
  slots = np.arange(last - CAPACITY, last) % CAPACITY
  return jax.tree.map(lambda x: x[slots], (cache.memories, cache.summaries))


def against_prefill(options, init):
  """A function of (tokens, answers, cache) of a block to errors, for segments that start from M_0."""
  recent = None

  def compare(x, y, cache):
    nonlocal recent
    partial = (int(cache.position[0]) - 1) % SEGMENT + 1
    x = jax.tree.map(lambda a: np.asarray(a)[:, -(CAPACITY + 1) * SEGMENT :].copy(), x)  # no view of the whole block
    recent = x if recent is None else jax.tree.map(lambda a, b: np.concatenate([a, b], 1), recent, x)
    length = CAPACITY * SEGMENT + partial
    recent = jax.tree.map(lambda a: a[:, -length:], recent)
    padded = jax.tree.map(lambda a: np.pad(a, [(0, 0), (0, SEGMENT - partial)] + [(0, 0)] * (a.ndim - 2)), recent)
    expected_y, expected = jax.device_get(prefill(options, padded, init, np.full(len(y), length)))
    # At a chunk's end the next chunk is begun by the step of its first token.
    chunk = (lambda c: c.chunk) if partial % CHUNK else (lambda c: None)
    stepped, fresh = ((c.state, c.keys, chunk(c)) for c in (cache, expected))
    return {
      "state": error(stepped, fresh),
      "cached": error(in_order(cache), in_order(expected)),
      "answers": error(y[:, -partial:], expected_y[:, length - partial : length]),
    }

  return compare


def against_pass(options, init):
  """A function of (tokens, answers, cache) of a block to errors, for states that carry over."""
  states, ends = {}, None

  def advance(dtype, x):
    x, m_0 = jax.tree.map(lambda a: a.astype(dtype), (x, init))
    start = states.get(dtype)
    if start is None:
      start = options.rule.start(m_0, np.moveaxis(x.k, 1, 2))
    states[dtype], ends = jax.device_get(write_block(options.rule, x, m_0, start))
    return ends

  def compare(x, _, cache):
    nonlocal ends
    with jax.enable_x64(True):
      new = advance(np.float64, x)
    ends = new if ends is None else jax.tree.map(lambda a, b: np.concatenate([a, b]), ends, new)
    ends = jax.tree.map(lambda a: a[-CAPACITY - 1 :], ends)
    errors = {
      "state": error(cache.state, states[np.float64]),
      "cached": error(in_order(cache)[0], jax.tree.map(lambda a: a[:-1], ends)),
    }
    if cache.keys.dtype == np.float32:
      advance(np.float32, x)
      errors["pass"] = error(states[np.float32], states[np.float64])
    return errors

  return compare


def resident():
  """MiB of this process's memory."""
  return (
    int(pathlib.Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
  )


def stream(rule, aggregation, carry, dtype, count, *, rows=ROWS, block=BLOCK):
  """A combination's record: tokens read, memory use, largest state and errors after each block."""
  options = options_of(rule, aggregation, carry)
  init = jax.device_get(options.rule.init(jax.random.key(0), heads=HEADS, head_dim=HEAD_DIM))
  compare = (against_prefill if carry == "independent" else against_pass)(options, init)
  length, blocks, begin = count // rows, [], time.monotonic()
  names = dict(zip(NAMES, (rule, aggregation, carry, dtype), strict=True))
  with (
    jax.enable_x64(dtype == "float64"),
    tqdm.tqdm(total=count, unit=" tokens", unit_scale=True, desc=" ".join(names.values())) as progress,
  ):
    empty = functools.partial(decode.init_cache, options, batch=rows, head_dim=HEAD_DIM, dtype=jnp.dtype(dtype))
    cache = jax.jit(empty)(init)  # compiled, so that no two leaves share a buffer and all can be donated
    for number, start in enumerate(range(0, length, block)):
      x = tokens(options.rule, jax.random.fold_in(jax.random.key(1), number), rows, min(block, length - start))
      x = jax.tree.map(lambda a: a.astype(dtype), x)
      y, cache = steps(options, x, init, cache)
      y, fetched = jax.device_get((y, cache))
      assert (fetched.position == min(start + block, length)).all()
      errors = {name: float(f"{value:.3g}") for name, value in compare(x, y, fetched).items()}
      done = rows * int(fetched.position[0])
      largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(fetched.state))
      del x, y
      held = dict(resident_mib=round(resident(), 1), array_bytes=sum(array.nbytes for array in jax.live_arrays()))
      seconds = round(time.monotonic() - begin, 1)
      blocks.append(dict(tokens=done, seconds=seconds, **held, largest=round(largest, 3), **errors))
      progress.update(done - progress.n)
  return names | dict(blocks=blocks)


def growth(record):
  """MiB by which the median of a stream's second half exceeds that of its first, without the last block's compilation.

  Medians, because the allocator keeps some blocks' arrays for a while before it frees them.
  """
  sizes = [block["resident_mib"] for block in record["blocks"][:-1]]
  half = len(sizes) // 2
  return statistics.median(sizes[half:]) - statistics.median(sizes[:half]) if half else 0.0


def bound(record, block):
  """The largest error allowed in a block.

  States that carry over accumulate rounding errors. In float32 a step, which rounds its state at every token, may err
  ten times as much as the pass, which rounds at every chunk. The solve in a chunk multiplies bfloat16 parts, with an
  error near 2^-16.
  """
  if record["carry"] == "independent":
    return 2**-13 if memory.rules.get(record["rule"]).solve else 1e-5
  return 1e-7 if record["dtype"] == "float64" else 10 * block["pass"]


def problems(record):
  """Descriptions of what exceeds its bound, one line each."""
  lines, blocks = [], record["blocks"]
  for name in {"state", "cached", "answers"} & set(blocks[0]):
    bad = [block for block in blocks if not block[name] <= bound(record, block)]
    lines += [f"{name} differs by {block[name]} after {block['tokens']:,} tokens" for block in bad[:1]]
  if len({block["array_bytes"] for block in blocks}) > 1:
    lines.append("arrays are left behind")
  if growth(record) > GROWTH:
    lines.append(f"the process grew by {growth(record):.1f} MiB")
  return lines


def summary(record):
  """A stream's totals, and six of its blocks: the first, the tenth, at a quarter, at half, and the last two."""
  blocks = record["blocks"]
  count = len(blocks)
  kept = {1, 10, -(-count // 4), -(-count // 2), count - 1, count} & set(range(1, count + 1))
  by_block = {name: [block[name] for block in blocks] for name in blocks[0]}
  return dict(
    **{name: record[name] for name in NAMES},
    growth_mib=round(growth(record), 1),
    problems=problems(record),
    block_count=count,
    array_bytes=sorted(set(by_block["array_bytes"])),
    largest=[min(by_block["largest"]), max(by_block["largest"])],
    worst={name: max(by_block[name]) for name in ERRORS if name in by_block},
    blocks=[blocks[number - 1] for number in sorted(kept)],
  )


def report(record):
  """A combination's summary in one line, followed by its problems."""
  last = record["blocks"][-1]
  errors = ", ".join(f"{name} {last[name]:.1e}" for name in ERRORS if name in last)
  name = " ".join(record[name] for name in NAMES)
  totals = f"{last['tokens']:,} tokens in {last['seconds']} s, {record['growth_mib']:+.1f} MiB"
  lines = [f"{name}: {totals}; at the end {errors}"]
  return "\n  ".join(lines + record["problems"])


def read(path, count):
  """The records of an earlier run with the same number of tokens and version of JAX."""
  record = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
  same = (record.get("tokens"), record.get("jax")) == (count, jax.__version__)
  return {tuple(stream[name] for name in NAMES): stream for stream in record["streams"]} if same else {}


def write(path, run, records):
  """Writes the file, one line per block."""
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(run | {"streams": [record | {"blocks": []} for record in records]}, indent=1)
  for record in records:
    lines = ",\n".join(f"    {json.dumps(block)}" for block in record["blocks"])
    text = text.replace('"blocks": []', f'"blocks": [\n{lines}\n   ]', 1)
  storage.write(path, text + "\n")


def main(_):
  """Runs every combination that the file does not have, and prints a line for each."""
  path = pathlib.Path(_JSON.value) if _JSON.value else None
  git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
  run = dict(command=cli.command("bench.long_stream"), tokens=_TOKENS.value, jax=jax.__version__)
  run |= dict(machine=platform.machine(), cores=os.cpu_count(), rows=ROWS, heads=HEADS, head_dim=HEAD_DIM)
  run |= dict(segment_length=SEGMENT, chunk=CHUNK, capacity=CAPACITY)
  records = read(path, _TOKENS.value)
  for combination in COMBINATIONS:
    if combination not in records:
      records[combination] = dict(commit=git.stdout.strip()) | summary(stream(*combination, _TOKENS.value))
      if path:
        write(path, run, [records[each] for each in COMBINATIONS if each in records])
    print(report(records[combination]), flush=True)
  sys.exit(any(record["problems"] for record in records.values()))


if __name__ == "__main__":
  cli.run(main)
