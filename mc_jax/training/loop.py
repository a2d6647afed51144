"""A run from its configuration to its report, stopped and resumed at will."""

from __future__ import annotations

import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath

from mc_jax.data import ngram, sources, tokenizers, windows
from mc_jax.training import config as config_lib
from mc_jax.training import distributed, flops, metrics, report, sampling, state
from mc_jax.training.checkpointing import Checkpoints, changed
from mc_jax.training.config import Config
from mc_jax.training.evaluate import bits_per_byte
from mc_jax.training.interrupt import Interrupt, deferred
from mc_jax.training.outputs import Outputs, outputs
from mc_jax.training.profiling import Trace
from mc_jax.training.progress import Progress, duration
from mc_jax.training.step import eval_step, loss_sum, lower

PROMPT_LENGTH = 64  # bytes of validation text that the final sample continues


@dataclasses.dataclass(frozen=True)
class Result:
  """Where a run ended; `stopped_by` is the signal that ended it before its last step, or None."""

  step: int
  validation_bits_per_byte: float | None
  stopped_by: signal.Signals | None = None


@dataclasses.dataclass(frozen=True)
class _Run:
  """What every part of a run is given."""

  config: Config
  mesh: jax.sharding.Mesh
  workdir: epath.Path
  files: Outputs
  batches: windows.Batches
  evaluate: Callable[[state.TrainState], float]  # bits per byte of the validation text


def train(
  config: Config,
  workdir: epath.PathLike,
  profile: range = range(0),
  devices: Sequence[jax.Device] | None = None,
) -> Result:
  """Trains to train.steps, from the newest checkpoint in `workdir` if there is one.

  Settings, data and workdir are checked before anything is compiled or written. In a job of several processes, all of
  them call this with the same values; the first one writes everything but the checkpoints.

  Args:
    config: of the run.
    workdir: folder of all that the run writes; made if missing. On a file system or in a bucket (gs://BUCKET/FOLDER)
      that all processes see.
    profile: steps, counted from 1, to trace with jax.profiler.
    devices: that config.mesh is made of; None: all of the job's.

  Raises:
    ConfigError: settings, devices, data or a workdir that do not go together.
    Diverged: a loss or gradient that is not finite; the last checkpoint stays.
  """
  begin = time.monotonic()
  mesh = config.check().make_mesh(devices)
  corpus = sources.load(config.data)
  texts = (corpus.training, corpus.validation)
  distributed.require_equal("the settings or the text", config_lib.to_json(config).encode(), *texts)
  shapes = windows.shapes(config.data, mesh)
  validation = windows.validation(corpus.validation, config.data)
  references = {
    "byte unigram": ngram.bits_per_byte(ngram.unigram(corpus.training), validation),
    "byte bigram": ngram.bits_per_byte(ngram.bigram(corpus.training), validation),
  }
  jitted = eval_step(config, mesh)

  def evaluate(current: state.TrainState) -> float:
    with jax.set_mesh(mesh):
      return bits_per_byte(jitted, current.params, (windows.place(batch, shapes) for batch in validation))

  workdir = epath.Path(workdir)
  with outputs(workdir) as files, Checkpoints(workdir, config.train.keep_checkpoints) as checkpoints:
    batches = windows.Batches(windows.training(corpus.training, config.data), shapes)
    run = _Run(config, mesh, workdir, files, batches, evaluate)
    current = _start(run, checkpoints)
    print(report.table(_facts(run, corpus, current, references), "run"), flush=True)
    bits = meter = None
    if int(current.step) < config.train.steps:
      with deferred() as interrupt:
        current, bits, meter = _steps(run, current, checkpoints, interrupt, profile)
      if int(current.step) < config.train.steps:
        return Result(int(current.step), bits, interrupt.signal)
    if bits is None:  # the run was complete already
      bits = evaluate(current)
    rows = {"steps": f"{int(current.step):,}", "time of this run": duration(time.monotonic() - begin)}
    if meter is not None:
      rows["time in steps"] = duration(meter.seconds)
      rows["tokens per second"] = f"{meter.tokens_per_second:,.0f}"
    for name, reference in references.items():
      rows[f"{name}, validation"] = f"{reference:.3f} bits per byte"
    rows["this model, validation"] = f"{bits:.3f} bits per byte"
    _finish(run, current.params, corpus.validation[:PROMPT_LENGTH], references, rows)
  return Result(int(current.step), bits)


def _steps(
  run: _Run,
  current: state.TrainState,
  checkpoints: Checkpoints,
  interrupt: Interrupt,
  profile: range,
) -> tuple[state.TrainState, float | None, metrics.Meter]:
  """The steps that are left; returns the state, the latest validation bits per byte, the meter."""
  train, bits = run.config.train, None
  first = int(current.step) + 1
  update, meter = _compile(run.config, run.mesh)
  with (
    metrics.MetricsLog(run.files.folder, first - 1) as log,
    Progress(first - 1, train.steps) as progress,
    Trace(profile, run.files.folder) as trace,
  ):
    meter.restart()
    for step in range(first, train.steps + 1):
      trace.before(step)
      current, values = update(current, next(run.batches))
      trace.after(step, values)
      meter.add(step, values)
      last = interrupt.stops_after(step) or step == train.steps
      evaluates = step == train.steps or step % train.eval_every == 0
      saves = last or step % train.checkpoint_every == 0
      if not (evaluates or saves or step % train.log_every == 0):
        continue
      records = meter.collect()
      if evaluates:
        bits = records[-1]["validation_bits_per_byte"] = run.evaluate(current)
      log.write(records)
      progress.report(records[-1])
      if saves:
        metrics.require_finite(step, current.params)
        run.files.send()  # ahead of the checkpoint: whoever goes on from it finds all records up to it
        checkpoints.save(step, current, run.batches, run.config)
      if last:
        break
      meter.restart()
  return current, bits, meter


def _start(run: _Run, checkpoints: Checkpoints) -> state.TrainState:
  """The newest checkpoint's state, with the batches moved to its position; or a new one."""
  config, mesh, step = run.config, run.mesh, checkpoints.latest()
  if step is None:
    current = state.create(config, mesh)
  else:
    fields = changed(checkpoints.config(step), config, run.workdir)
    current = checkpoints.restore(step, state.abstract(config, mesh), run.batches)
    run.files.fetch(metrics.JSONL)
    print(f"going on from the checkpoint of step {step} in {run.workdir}")
    for field, (then, now) in fields.items():
      print(f"  {field} was {then!r} and is now {now!r}")
  (run.files.folder / "config.json").write_text(config_lib.to_json(config) + "\n", encoding="utf-8")
  run.files.send()
  return current


def _compile(config: Config, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Compiled, metrics.Meter]:
  """The training step, compiled for the batches of `config`, and a meter that knows their size."""
  begin = time.monotonic()
  print("compiling the training step ...", flush=True)
  update = lower(config, mesh).compile()
  print(f"compiled in {duration(time.monotonic() - begin)}", flush=True)
  useful = None
  shapes = windows.shapes(config.data, mesh)
  if metrics.peak_flops(mesh.devices.flat[0]):
    # Backward costs twice the forward pass; what is recomputed does not count as useful.
    forward = flops.count(functools.partial(loss_sum, state.graph(config)), state.abstract(config, mesh).params, shapes)
    useful = 3 * forward
  return update, metrics.Meter(shapes["tokens"].size, useful, mesh.devices.flatten())


def _facts(
  run: _Run,
  corpus: sources.Corpus,
  current: state.TrainState,
  references: dict[str, float],
) -> dict[str, str]:
  """What a run is, for people."""
  model = run.config.model
  memory = model.memory
  mixer = model.mixer if model.mixer == "transformer" else f"{memory.rule} + {memory.aggregation}"
  files = {"training": corpus.training_files, "validation": corpus.validation_files}
  streams = {"training": corpus.training, "validation": corpus.validation}
  return {
    "model": f"{mixer}, {model.layers} layers, {state.parameter_count(current):,} parameters",
    **{f"{name} text": f"{len(streams[name]):,} bytes in {len(files[name]):,} files" for name in streams},
    **{name: f"{bits:.3f} bits per byte on validation" for name, bits in references.items()},
    "devices": _devices(run.mesh),
    "workdir": str(run.workdir),
  }


def _devices(mesh: jax.sharding.Mesh) -> str:
  """Such as "TPU v5 lite", or "8 x TPU v5 lite (data=2, model=4)"."""
  kind = mesh.devices.flat[0].device_kind
  split = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
  return f"{mesh.size} x {kind} ({split})" if split else kind


def _finish(
  run: _Run,
  params: dict,
  prompt: np.ndarray,
  references: dict[str, float],
  rows: dict[str, str],
) -> None:
  """Writes and prints the table, the curve and the sample."""
  train, folder = run.config.train, run.files.folder
  report.curve(folder / report.CURVE, metrics.read(folder), references)
  rows |= {"loss curve": str(run.workdir / report.CURVE)}
  if train.sample_length:
    with jax.set_mesh(run.mesh):
      continuation = sampling.sample(
        state.graph(run.config),
        params,
        prompt,
        run.mesh,
        length=train.sample_length,
        window=run.config.data.length,
        temperature=train.sample_temperature,
        seed=train.seed,
      )
    text = (
      f"prompt, from the validation text:\n{tokenizers.decode(prompt)}\n\n"
      f"continuation, temperature {train.sample_temperature}:\n{tokenizers.decode(continuation)}\n"
    )
    (folder / report.SAMPLE).write_text(text, encoding="utf-8")
    print(text)
    rows |= {"sample": str(run.workdir / report.SAMPLE)}
  table = report.table(rows, "result")
  (folder / report.TABLE).write_text(table + "\n", encoding="utf-8")
  print(table, flush=True)
