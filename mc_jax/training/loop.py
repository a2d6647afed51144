"""A run from its configuration to its report. It can be stopped and resumed at any time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from etils import epath

from mc_jax import storage
from mc_jax.data import datasets, identity, loader, windows
from mc_jax.errors import ConfigError
from mc_jax.evaluation import scoring
from mc_jax.inference.text import known
from mc_jax.kernels import cost
from mc_jax.parallel import chips
from mc_jax.training import config as config_lib
from mc_jax.training import distributed, kept, metrics, optimizer, report, sampling, stability, state, trained
from mc_jax.training.checkpointing import AGGREGATION, HOW, Checkpoints, changed, require_order
from mc_jax.training.config import Config
from mc_jax.training.faulty import Faulty
from mc_jax.training.interrupt import Interrupt, deferred
from mc_jax.training.outputs import Outputs, occupied, outputs
from mc_jax.training.profiling import Trace
from mc_jax.training.progress import Progress, duration
from mc_jax.training.step import loss_sum, lower
from mc_jax.training.watchdog import Watchdog, heartbeat


@dataclasses.dataclass(frozen=True)
class Result:
  """The end of a run; `stopped_by` is the signal that stopped it before its last step, or None."""

  step: int
  validation_bits: float | None  # per byte of text, or per answer token if all data are recall tasks
  stopped_by: signal.Signals | None = None


@dataclasses.dataclass(frozen=True)
class _Run:
  """What the functions of a run share."""

  config: Config
  mesh: jax.sharding.Mesh
  workdir: epath.Path
  files: Outputs
  data: datasets.Dataset
  batches: loader.Batches
  evaluate: Callable[[state.TrainState], dict[str, float]]  # see `_evaluation`


class _Update(NamedTuple):
  """A compiled training step and its useful FLOPs, 0 if the device's peak is unknown."""

  run: jax.stages.Compiled
  flops: int = 0


def train(
  config: Config,
  workdir: epath.PathLike,
  profile: range = range(0),
  devices: Sequence[jax.Device] | None = None,
) -> Result:
  """Trains up to train.steps, from the newest checkpoint in `workdir` if there is one.

  Settings, data and workdir are checked before anything is compiled or written. In a job of several processes, all of
  them call this with the same values; the first one writes everything except the checkpoints.

  Args:
    config: The run's configuration.
    workdir: Folder for everything the run writes, created if missing, on a file system or in a bucket
      (gs://BUCKET/FOLDER) that all processes see.
    profile: Steps, counted from 1, to trace with jax.profiler.
    devices: The devices of config.mesh; None: all of the job's.

  Raises:
    ConfigError: Settings, devices, data or a workdir that do not work together.
    Diverged: Losses or gradients that are not finite, see Faulty; older checkpoints stay.
    OSError: Something could not be written, or another run uses the workdir; older checkpoints stay.
  """
  begin, train = time.monotonic(), config.train
  mesh = config.check().make_mesh(devices)
  workdir = epath.Path(workdir)
  data = datasets.load(kept.available(workdir, config.data))
  if config.model.vocab_size < data.vocab_size:
    raise ConfigError(
      f"model.vocab_size={config.model.vocab_size} must be at least {data.vocab_size}, the number of the data's ids "
      f"(data.source={config.data.source}, data.tokenizer={config.data.tokenizer})"
    )
  distributed.require_equal("the settings or the data", config_lib.to_json(config).encode(), data.identity.to_bytes())
  with (
    occupied(workdir),
    outputs(workdir) as files,
    Checkpoints(workdir, train.keep_checkpoints, train.keep_every, train.keep_best) as checkpoints,
    contextlib.closing(data.batches(mesh)) as batches,
  ):
    run = _Run(config, mesh, workdir, files, data, batches, _evaluation(config, mesh, data))
    current = _start(run, checkpoints)
    print(report.table(_facts(run, current), "run"), flush=True)
    result = meter = None
    if int(current.step) < train.steps:
      checkpoints.require_space(current)
      updates = _compile(config, mesh, int(current.step))
      meter = metrics.Meter(windows.shapes(config.data, mesh)["tokens"].size, mesh.devices.flatten())
      with deferred() as interrupt, Watchdog(train.hang_minutes) as watchdog:
        try:
          current, result = _steps(run, current, updates, meter, checkpoints, interrupt, watchdog, profile)
        finally:
          checkpoints.wait()  # under the watchdog, and also if an error ends the run
      if int(current.step) < train.steps:
        return Result(int(current.step), result, interrupt.signal)
    if result is None:  # the run was already complete
      result = run.evaluate(current)[f"validation_bits_per_{data.unit}"]
    rows = {"steps": f"{int(current.step):,}", "time of this run": duration(time.monotonic() - begin)}
    if meter is not None:
      rows["time in steps"] = duration(meter.seconds)
      rows["tokens per second"] = f"{meter.tokens_per_second:,.0f}"
      if config.data.packing.method != "windows":
        rows["padding"] = f"{batches.padding:.1%} of the positions in this process's rows"
    for name, reference in data.references.items():
      rows[f"{name}, validation"] = f"{reference:.3f} bits per byte"
    rows["this model, validation"] = f"{result:.3f} bits per {data.unit}"
    _finish(run, current.params, rows)
  return Result(int(current.step), result)


def _evaluation(
  config: Config, mesh: jax.sharding.Mesh, data: datasets.Dataset
) -> Callable[[state.TrainState], dict[str, float]]:
  """(state) -> {"validation_bits_per_byte": ...} over all text and, with several sources, for each source."""
  score = scoring.scorer(state.graph(config), config.data, mesh)

  def evaluate(current: state.TrainState) -> dict[str, float]:
    sums = {name: scoring.bits(score(current.params, held.batches)) for name, held in data.validation.items()}
    alike = [name for name, held in data.validation.items() if held.unit == data.unit]
    count = sum(data.validation[name].count for name in alike)
    record = {f"validation_bits_per_{data.unit}": sum(sums[name] for name in alike) / count}
    if len(sums) > 1:
      for name, held in data.validation.items():
        record[f"validation_bits_per_{held.unit}/{name}"] = sums[name] / held.count
    return record

  return evaluate


def _steps(
  run: _Run,
  current: state.TrainState,
  updates: dict[bool, _Update],
  meter: metrics.Meter,
  checkpoints: Checkpoints,
  interrupt: Interrupt,
  watchdog: Watchdog,
  profile: range,
) -> tuple[state.TrainState, float | None]:
  """Runs the remaining steps; returns the state and the latest validation bits."""
  train, result, due = run.config.train, None, False
  first = int(current.step) + 1
  with (
    metrics.MetricsLog(run.files.folder, first - 1) as log,
    Progress(first - 1, train.steps, run.data.unit, run.data.units_per_token) as progress,
    Trace(profile, run.files.folder) as trace,
  ):
    probe = stability.probe(run.config, run.mesh) if train.probe_every else None
    faulty = Faulty(run.config, run.workdir, metrics.read(run.files.folder))
    meter.restart()
    for step in range(first, train.steps + 1):
      trace.before(step)
      begin, batch = run.batches.position, next(run.batches)
      faulty.keep(step, batch, range(begin, run.batches.position))
      update = updates[step <= run.config.dense_steps]
      current, values = update.run(current, batch)
      trace.after(step, values)
      if probe and step % train.probe_every == 0:
        values |= probe(current.params, batch)
      meter.add(step, values, update.flops)
      watchdog.finished()
      last = interrupt.stops_after(step) or step == train.steps
      # A run that must stop has only seconds left for the checkpoint.
      evaluates = step == train.steps or (step % train.eval_every == 0 and not last)
      due |= last or step % train.checkpoint_every == 0
      if not (evaluates or due or step % train.log_every == 0):
        continue
      records, evaluated = meter.collect(), None
      watchdog.finished()
      try:
        faulty.look(records, current)
      except metrics.Diverged:
        log.write(records)
        raise
      if evaluates:
        with heartbeat("evaluating"):
          records[-1] |= run.evaluate(current)
        watchdog.finished()
        result = evaluated = records[-1][f"validation_bits_per_{run.data.unit}"]
      log.write(records)
      progress.report(records[-1])
      # A state whose next update failed may be the cause: it must not replace an older checkpoint.
      if due and (last or "skipped" not in records[-1]):
        metrics.require_finite(step, current.params)
        run.files.send()  # before the checkpoint: a run that resumes from it finds all records up to it
        checkpoints.save(step, current, run.batches, run.config, evaluated)
        watchdog.finished()
        due = False
      if last:
        break
      meter.restart()
  return current, result


def _start(run: _Run, checkpoints: Checkpoints) -> state.TrainState:
  """The newest checkpoint's state, with the batches moved to its position, or the initial state."""
  config, mesh, step = run.config, run.mesh, checkpoints.latest()
  if step is None:
    current = _initial(run)
  else:
    stored = config_lib.from_stored(checkpoints.config(step))
    fields = changed(stored, config, run.workdir)
    require_order(stored, config)
    lines = identity.resumed(checkpoints.identity(step), run.data.identity, config.data.allow_growth)
    schedules = (stored.optimizer, stored.train.steps, config.optimizer, config.train.steps)
    lines += optimizer.schedule_changes(*schedules, done=step)
    if step < max(dense := (stored.dense_steps, config.dense_steps)) and dense[0] != dense[1]:
      lines.append(f"all caches are read up to step {dense[1]:,}; before, that was up to step {dense[0]:,}")
    current = checkpoints.restore(step, state.abstract(config, mesh), run.batches)
    run.files.fetch(metrics.JSONL)
    print(f"resuming from the checkpoint of step {step} in {run.workdir}")
    for field, (then, now) in fields.items():
      print(f"  {field} was {then!r} and is now {now!r}")
    for line in lines:
      print(f"  {line}")
  kept.keep(run.files, run.data.config)
  storage.write(run.files.folder / "config.json", config_lib.to_json(config) + "\n")
  run.files.send()
  return current


def _initial(run: _Run) -> state.TrainState:
  """The state before the first step, with the parameters of train.start_from if it is set."""
  config, mesh, origin = run.config, run.mesh, run.config.train.start_from
  if not origin:
    return state.create(config, mesh)
  changeable = (*AGGREGATION, *HOW, "train.seed")
  reading = {name: value for name, value in config_lib.fields(config).items() if name in changeable}
  model = trained.load(storage.path(origin), reading, mesh=mesh, scores_may_differ=True)
  changed(model.config, config, storage.path(origin))  # raises if anything else differs in the model
  _require_same_ids(model, run)
  print(f"starting with the parameters of step {model.step} in {origin}")
  for name, (then, now) in config_lib.differences(model.stored, model.config).items():
    print(f"  {name} was {then!r} there and is {now!r} here")
  for change in model.changes:
    print(f"  {change}")
  return dataclasses.replace(state.create(config, mesh), params=model.params)


def _require_same_ids(origin: trained.Trained, run: _Run) -> None:
  """Raises ConfigError if ids mean something else in the run that the parameters come from."""
  folder, data = run.config.train.start_from, origin.stored.data
  if origin.identity is None:
    print("the checkpoint does not record the tokenizer it was trained with: it cannot be compared")
  elif origin.identity.tokenizer != run.data.identity.tokenizer:
    there = f"data.tokenizer={data.tokenizer}" if data.has_text else f"symbols without text (data.source={data.source})"
    here = f"data.tokenizer={run.config.data.tokenizer}" if run.config.data.has_text else "symbols without text"
    raise ConfigError(
      f"train.start_from={folder} was trained on {there}, and this run reads {here}: ids have another meaning. Use "
      "the same tokenizer and data.separator, or leave out train.start_from"
    )


def _compile(config: Config, mesh: jax.sharding.Mesh, done: int) -> dict[bool, _Update]:
  """The training steps needed after step `done`, by whether they read all caches (model.memory.dense_steps)."""
  kinds = {step <= config.dense_steps: config.of_step(step) for step in (done + 1, config.train.steps)}
  return {dense: _compiled(config, mesh, " that reads all caches" * dense) for dense, config in kinds.items()}


def _compiled(config: Config, mesh: jax.sharding.Mesh, kind: str) -> _Update:
  """The training step, compiled for the configuration's batches."""
  begin, name = time.monotonic(), f"compiling the training step{kind}"
  print(f"{name} ...", flush=True)
  with heartbeat(name):
    update = lower(config, mesh).compile()
  print(f"compiled in {duration(time.monotonic() - begin)}", flush=True)
  if not chips.peak_flops(mesh.devices.flat[0]):
    return _Update(update)
  # The backward pass costs twice the forward pass; recomputation is not useful work.
  params, shapes = state.abstract(config, mesh).params, windows.shapes(config.data, mesh)
  return _Update(update, 3 * cost.work(functools.partial(loss_sum, state.graph(config)), params, shapes).flops)


def _facts(run: _Run, current: state.TrainState) -> dict[str, str]:
  """The table that a run prints at its start."""
  model = run.config.model
  layers = model.label
  if dense := run.config.dense_steps:
    layers += f" ({model.memory.top_k} caches a token; all of them up to step {dense:,})"
  return {
    "model": f"{layers}, {model.layers} layers, {state.parameter_count(current):,} parameters",
    **run.data.facts,
    **{name: f"{value:.3f} bits per byte on validation" for name, value in run.data.references.items()},
    "devices": _devices(run.mesh),
    "workdir": str(run.workdir),
  }


def _devices(mesh: jax.sharding.Mesh) -> str:
  """For example "TPU v5 lite", or "8 x TPU v5 lite (data=2, model=4)"."""
  kind = mesh.devices.flat[0].device_kind
  split = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
  return f"{mesh.size} x {kind} ({split})" if split else kind


def _finish(run: _Run, params: dict, rows: dict[str, str]) -> None:
  """Writes and prints the table, the curve and the sample."""
  train, folder, data = run.config.train, run.files.folder, run.data
  report.curve(folder / report.CURVE, metrics.read(folder), data.references, data.unit, data.units_per_token)
  rows |= {"loss curve": str(run.workdir / report.CURVE)}
  if train.sample_length and data.unit == "byte":  # recall tasks have no text to continue
    with jax.set_mesh(run.mesh):
      continuation = sampling.sample(
        state.graph(run.config),
        params,
        data.prompt,
        run.mesh,
        length=train.sample_length,
        window=run.config.data.length,
        temperature=train.sample_temperature,
        seed=train.seed,
      )
    text = (
      f"prompt, from the validation text:\n{data.tokenizer.decode(data.prompt)}\n\n"
      f"continuation, temperature {train.sample_temperature}:\n"
      f"{data.tokenizer.decode(known(continuation, data.tokenizer))}\n"
    )
    storage.write(folder / report.SAMPLE, text)
    print(text)
    rows |= {"sample": str(run.workdir / report.SAMPLE)}
  table = report.table(rows, "result")
  storage.write(folder / report.TABLE, table + "\n")
  print(table, flush=True)
