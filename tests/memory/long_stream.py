"""Millions of tokens through `decode.step` with a bounded cache: is memory flat, and does a state drift from prefill's?

  JAX_PLATFORMS=cpu python tests/memory/long_stream.py --tokens=10000000 --json=docs/faults/long_stream.json

Each of COMBINATIONS reads that many tokens, ROWS streams side by side, in compiled blocks of steps; ten minutes of one
core. Tokens come block by block from a counter-based generator: random ones, keys of unit length, gates near where they
start in training. No row is as long as all its tokens: it has tokens / ROWS of them, and ends in the middle of a
segment and of a chunk.

After every block the cache is compared, each array's largest difference relative to its largest number, with

* carry="independent": a fresh prefill of the tokens of the segments that the cache still holds. Answers, online state,
  cached states and summaries.
* carry="checkpoint": what prefill's pass over the whole stream leaves, in float64, going on from block to block.
  Online state and cached states. "pass" is the same pass in float32: what prefill itself drifts by.

Exits with 1 if a difference is above its bar (`allowed`), the arrays that are alive take more bytes after one block
than after another, or the process grows by more than GROWTH. A run that was stopped goes on from its file, which has of
each stream what came out of all blocks, and some of them (`summary`).
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import samples
import tqdm

from mc_jax import memory
from mc_jax.memory import caching, decode, online, passes, segments

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
GROWTH = 32.0  # MiB of resident memory; a block's tokens alone are as much


def options_of(rule, aggregation, carry):
  """A layer whose cache holds CAPACITY segments: each new one takes the oldest one's place."""
  return decode.Options(
    memory.rules.get(rule, chunk=CHUNK), memory.segments.constant(SEGMENT), aggregation, carry, capacity=CAPACITY
  )


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def tokens(rule, key, rows, length):
  """Inputs of rows x length tokens, float32; without M_0."""
  *keys, gate_key = jax.random.split(key, 5)
  q, k, v, u = (jax.random.normal(key, (rows, length, HEADS, HEAD_DIM), jnp.float32) for key in keys)
  unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k)]
  noise = 0.5 * jax.random.normal(gate_key, (len(rule.gates), rows, length, HEADS), jnp.float32)
  starts = rule.gate_init(SEGMENT)
  gates = {
    name: start.maximum * jax.nn.sigmoid(start.bias + x) for (name, start), x in zip(starts.items(), noise, strict=True)
  }
  return samples.Inputs(*unit, v, u, gates, {})


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def steps(options, x, init, cache):
  """A block of steps: answers [rows, length, heads, head_dim], and the cache."""

  def step(cache, token):
    y, cache = decode.step(options, *token[:5], init, cache)
    return cache, y[:, 0]

  cache, y = jax.lax.scan(step, cache, samples.map_tokens(lambda a: jnp.moveaxis(a, 1, 0)[:, :, None], x))
  return jnp.moveaxis(y, 0, 1), cache


@functools.partial(jax.jit, static_argnums=0)
def prefill(options, x, init, lengths):
  return decode.prefill(options, *x[:5], init, lengths=lengths)


@functools.partial(jax.jit, static_argnums=0)
def write_block(rule, x, init, start):
  """Prefill's pass over a block: the state after it, and the memories at the ends of its segments."""
  x = caching.heads_first(*x[:5], None)
  lengths = segments.constant(SEGMENT).lengths(x.k.shape[2])
  nothing = x._replace(q=x.k[..., :0])
  done = passes.write(rule, init, nothing, lengths, read=lambda _, q: q, carries=True, side_by_side=1, start=start)
  return done.end, done.states.memory


def error(found, expected):
  """The largest difference of two trees, relative to the largest number of each array."""
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


def in_order(cache):
  """(memories, summaries) of the cached segments, the oldest first."""
  last = (int(cache.position[0]) - 1) // SEGMENT
  slots = np.arange(last - CAPACITY, last) % CAPACITY
  return jax.tree.map(lambda x: x[slots], (cache.memories, cache.summaries))


def against_prefill(options, init):
  """(block's tokens, answers, cache) to errors, where segments start from M_0."""
  recent = None

  def compare(x, y, cache):
    nonlocal recent
    partial = (int(cache.position[0]) - 1) % SEGMENT + 1
    x = samples.map_tokens(lambda a: np.asarray(a)[:, -(CAPACITY + 1) * SEGMENT :].copy(), x)  # not a view of it all
    recent = x if recent is None else samples.map_tokens(lambda a, b: np.concatenate([a, b], 1), recent, x)
    length = CAPACITY * SEGMENT + partial
    recent = samples.map_tokens(lambda a: a[:, -length:], recent)
    padded = samples.map_tokens(lambda a: np.pad(a, [(0, 0), (0, SEGMENT - partial)] + [(0, 0)] * (a.ndim - 2)), recent)
    expected_y, expected = jax.device_get(prefill(options, padded, init, np.full(len(y), length)))
    # Where a chunk ends, a step has yet to begin the next one, and does with its first token.
    chunk = (lambda c: c.chunk) if partial % CHUNK else (lambda c: None)
    own, fresh = ((c.state, c.keys, chunk(c)) for c in (cache, expected))
    return {
      "state": error(own, fresh),
      "cached": error(in_order(cache), in_order(expected)),
      "answers": error(y[:, -partial:], expected_y[:, length - partial : length]),
    }

  return compare


def against_pass(options, init):
  """(block's tokens, answers, cache) to errors, where states go on."""
  states, ends = {}, None

  def goes_on(dtype, x):
    x, m_0 = jax.tree.map(lambda a: a.astype(dtype), (x, init))
    start = states.get(dtype)
    if start is None:
      start = online.start_state(options.rule, m_0, np.moveaxis(x.k, 1, 2))
    states[dtype], ends = jax.device_get(write_block(options.rule, x, m_0, start))
    return ends

  def compare(x, _, cache):
    nonlocal ends
    with jax.enable_x64(True):
      new = goes_on(np.float64, x)
    ends = new if ends is None else jax.tree.map(lambda a, b: np.concatenate([a, b]), ends, new)
    ends = jax.tree.map(lambda a: a[-CAPACITY - 1 :], ends)
    errors = {
      "state": error(cache.state, states[np.float64]),
      "cached": error(in_order(cache)[0], jax.tree.map(lambda a: a[:-1], ends)),
    }
    if cache.keys.dtype == np.float32:
      goes_on(np.float32, x)
      errors["pass"] = error(states[np.float32], states[np.float64])
    return errors

  return compare


def resident():
  """MiB of this process's memory."""
  return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def stream(rule, aggregation, carry, dtype, count, *, rows=ROWS, block=BLOCK):
  """A combination's record: after each block what it has read, its memory, the largest state, and the errors."""
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
    cache = jax.jit(empty)(init)  # compiled: no array is there twice, so that all can be donated
    for number, start in enumerate(range(0, length, block)):
      x = tokens(options.rule, jax.random.fold_in(jax.random.key(1), number), rows, min(block, length - start))
      x = samples.map_tokens(lambda a: a.astype(dtype), x)
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
  """MiB by which the median of a stream's second half is above that of its first, without the last block's compiling.

  Not the largest: the allocator keeps some blocks' arrays a while and gives them back.
  """
  sizes = [block["resident_mib"] for block in record["blocks"][:-1]]
  half = len(sizes) // 2
  return statistics.median(sizes[half:]) - statistics.median(sizes[:half]) if half else 0.0


def allowed(record, block):
  """The bar of a block's errors.

  States that go on add up roundings: in float32 a step, which rounds its state at every token, is measured by the pass,
  which does so at every chunk. A pass solves for errors by products of bfloat16 parts, each of them off by some 2^-16.
  """
  if record["carry"] == "independent":
    return 2**-13 if memory.rules.get(record["rule"]).solve else 1e-5
  return 1e-7 if record["dtype"] == "float64" else 10 * block["pass"]


def problems(record):
  """What is not as it should be, one line each."""
  found, blocks = [], record["blocks"]
  for name in {"state", "cached", "answers"} & set(blocks[0]):
    bad = [block for block in blocks if not block[name] <= allowed(record, block)]
    found += [f"{name} differs by {block[name]} after {block['tokens']:,} tokens" for block in bad[:1]]
  if len({block["array_bytes"] for block in blocks}) > 1:
    found.append("arrays are left behind")
  if growth(record) > GROWTH:
    found.append(f"the process grew by {growth(record):.1f} MiB")
  return found


def summary(record):
  """A record of all blocks together, and of some: the first, the tenth, at a quarter, at half, and the last two."""
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
  """A line about a combination's summary, and its problems."""
  last = record["blocks"][-1]
  errors = ", ".join(f"{name} {last[name]:.1e}" for name in ERRORS if name in last)
  name = " ".join(record[name] for name in NAMES)
  told = f"{last['tokens']:,} tokens in {last['seconds']} s, {record['growth_mib']:+.1f} MiB"
  lines = [f"{name}: {told}; at the end {errors}"]
  return "\n  ".join(lines + record["problems"])


def read(path, count):
  """Records of an earlier run of as many tokens, by the same JAX."""
  record = json.loads(path.read_text()) if path and path.exists() else {}
  same = (record.get("tokens"), record.get("jax")) == (count, jax.__version__)
  return {tuple(stream[name] for name in NAMES): stream for stream in record["streams"]} if same else {}


def write(path, run, records):
  """The file, one line a block."""
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(run | {"streams": [record | {"blocks": []} for record in records]}, indent=1)
  for record in records:
    lines = ",\n".join(f"    {json.dumps(block)}" for block in record["blocks"])
    text = text.replace('"blocks": []', f'"blocks": [\n{lines}\n   ]', 1)
  path.write_text(text + "\n", encoding="utf-8")


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--tokens", type=int, default=10_000_000, help="that each combination reads")
  parser.add_argument("--json", type=pathlib.Path, help="file for the records, written after each combination")
  arguments = parser.parse_args()
  git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
  run = dict(command=shlex.join(["python", *sys.argv]), tokens=arguments.tokens, jax=jax.__version__)
  run |= dict(machine=platform.machine(), cores=os.cpu_count(), rows=ROWS, heads=HEADS, head_dim=HEAD_DIM)
  run |= dict(segment_length=SEGMENT, chunk=CHUNK, capacity=CAPACITY)
  records = read(arguments.json, arguments.tokens)
  for combination in COMBINATIONS:
    if combination not in records:
      records[combination] = dict(commit=git.stdout.strip()) | summary(stream(*combination, arguments.tokens))
      if arguments.json:
        write(arguments.json, run, [records[each] for each in COMBINATIONS if each in records])
    print(report(records[combination]), flush=True)
  sys.exit(any(record["problems"] for record in records.values()))


if __name__ == "__main__":
  main()
