"""The launch scripts: what they print is what they do, with any argument, and they begin again after a preemption."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from mc_jax.training import metrics

ROOT = pathlib.Path(__file__).parent.parent
AWKWARD = "a b/'c' \"d\" $HOME $(echo e) `f` \\ *"
BUCKET = "gs://bucket/my 'run'"

REQUIRED = {
  "local.sh": [],
  "tpu_vm.sh": ["--name=titans", "--zone=us-east5-a", "--type=v5p-128"],
  "gke_jobset.sh": [
    *("--name=titans", "--image=region/image:1", "--accelerator=tpu-v5p-slice", "--topology=4x4x4", "--hosts=16")
  ],
}


def _launch(script, *arguments, **options):
  command = [ROOT / "launch" / script, *REQUIRED[script], *arguments]
  return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)


def _commands(done):
  """What a dry run would run: its lines that start with +, as a shell reads them."""
  source = "\n".join(line.removeprefix("+ ") for line in done.stderr.splitlines() if line.startswith("+ "))
  script = "show() { printf '%s\\0' \"$@\"; printf '\\n\\0'; }\n" + "\n".join(
    f"show {line}" for line in source.splitlines()
  )
  printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
  return [command.strip("\0").split("\0") for command in printed.split("\n\0") if command]


@pytest.mark.parametrize("script", ["common.sh", *REQUIRED])
def test_scripts_are_bash(script):
  subprocess.run(["bash", "-n", ROOT / "launch" / script], check=True)


@pytest.mark.parametrize("script", REQUIRED)
def test_arguments_are_quoted(script):
  done = _launch(script, "--config=c d.py", f"--workdir={BUCKET}", "--dry-run", "--", f"--config.data.paths={AWKWARD}")
  assert done.returncode == 0, done.stderr
  flags = ["--config=c d.py", f"--workdir={BUCKET}", f"--config.data.paths={AWKWARD}"]
  commands = _commands(done)
  if script == "local.sh":
    assert len(commands) == 2
    for i, command in enumerate(commands):
      assert [flag for flag in command if flag in flags] == flags
      assert f"--process_id={i}" in command
  elif script == "tpu_vm.sh":
    (train,) = (c[-1].removeprefix("--command=") for c in commands if "mc_jax.train" in c[-1])
    words = shlex.split(train.partition("mc_jax.train")[2].partition("& echo")[0].replace("$'", "'"))
    assert words == flags
    assert [command[3:5] for command in commands if "queued-resources" in command] == [
      ["queued-resources", "create"],
      ["queued-resources", "delete"],
    ]
  else:
    spec = yaml.safe_load(done.stdout)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], spec["failurePolicy"]["maxRestarts"]) == (16, 16, 100)
    (container,) = job["template"]["spec"]["containers"]
    assert [argument.replace("$$(", "$(") for argument in container["args"]] == flags
    assert commands == [["kubectl", "apply", "--filename=-"]]


@pytest.mark.parametrize("script", REQUIRED)
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--confg=c.py"], "not an option: --confg=c.py. There are --"),
    (["--config=c.py"], "--workdir is missing"),
    (["--config=c.py", "--workdir=gs://b/r", "--restarts=many"], "--restarts must be a whole number from 1, got many"),
    (["--config=c.py", "--workdir=gs://b/r", "extra"], "not an option: extra"),
  ],
)
def test_mistakes_are_named(script, arguments, message):
  done = _launch(script, *arguments)
  assert done.returncode == 2
  assert message in done.stderr
  assert done.stdout == ""


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke_jobset.sh"])
def test_several_machines_need_a_bucket(script):
  done = _launch(script, "--config=c.py", "--workdir=runs/x", "--dry-run")
  assert done.returncode == 2
  assert "--workdir must be gs://BUCKET/FOLDER" in done.stderr


@pytest.mark.parametrize("script", REQUIRED)
def test_help_is_the_head_of_the_script(script):
  done = _launch(script, "--help")
  assert done.returncode == 0
  assert "--workdir=" in done.stdout
  assert "common.sh" not in done.stdout


def _programs(folder, **programs):
  """A PATH with these bash scripts in front; each notes its arguments in `folder`/log."""
  for name, body in programs.items():
    path = folder / name
    path.write_text(f"#!/bin/bash\nprintf '%s ' {name} \"$@\" >> {folder}/log; echo >> {folder}/log\n{body}\n")
    path.chmod(0o755)
  return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


GCLOUD = """
case $* in
  *describe*) head -1 states; sed -i 1d states ;;
  *cat\\ train.status*) echo 1 ;;
  *mc_jax.train*) echo run >> runs; [ "$(wc -l < runs)" = 2 ] ;;
esac
"""


def test_a_preempted_tpu_is_replaced_and_the_run_goes_on(tmp_path):
  states = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "", "PROVISIONING", "ACTIVE"]
  (tmp_path / "states").write_text("\n".join(states) + "\n")
  environment = _programs(tmp_path, gcloud=GCLOUD, sleep="")
  done = _launch("tpu_vm.sh", "--config=c.py", f"--workdir={BUCKET}", "--spot", env=environment, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  verbs = ("create", "delete", "scp", "mc_jax.train")
  lines = (tmp_path / "log").read_text().splitlines()
  acts = [next(verb for verb in verbs if verb in line) for line in lines if any(verb in line for verb in verbs)]
  assert acts == ["create", "scp", "mc_jax.train", "delete", "create", "scp", "mc_jax.train", "delete"]


def test_settings_that_cannot_work_are_not_tried_again(tmp_path):
  (tmp_path / "states").write_text("ACTIVE\n")
  environment = _programs(tmp_path, gcloud=GCLOUD.replace("echo 1", "echo 2"), sleep="")
  done = _launch("tpu_vm.sh", "--config=c.py", f"--workdir={BUCKET}", env=environment, cwd=tmp_path)
  assert done.returncode == 2
  assert "the run cannot go on" in done.stderr
  assert (tmp_path / "runs").read_text() == "run\n"


PYTHON = """
for flag; do case $flag in --process_id=*) i=${flag#*=} ;; esac; done
echo $i >> started
trap 'echo stopped >> started; exit 143' TERM
case $(wc -l < started):$MODE in
  *:settings) exit 2 ;;
  *:wait) sleep 30 & wait $! ;;
  [12]:*) exit 1 ;;
esac
"""


@pytest.mark.parametrize(("mode", "code", "starts"), [("die", 0, 4), ("settings", 2, 2)])
def test_local_processes_are_started_again_together(tmp_path, mode, code, starts):
  environment = _programs(tmp_path, fakepython=PYTHON) | {"MODE": mode}
  done = _launch("local.sh", "--config=c", "--workdir=w", "--python=fakepython", env=environment, cwd=tmp_path)
  assert done.returncode == code, done.stderr
  assert len((tmp_path / "started").read_text().split()) == starts


def test_a_signal_to_the_local_script_stops_all(tmp_path):
  environment = _programs(tmp_path, fakepython=PYTHON) | {"MODE": "wait"}
  command = [ROOT / "launch/local.sh", "--config=c", "--workdir=w", "--python=fakepython"]
  process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE)
  started, deadline = tmp_path / "started", time.monotonic() + 20
  while not started.exists() or len(started.read_text().split()) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.05)
  time.sleep(0.3)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=20) == 128 + signal.SIGTERM
  assert started.read_text().split().count("stopped") == 2


@pytest.mark.slow
def test_two_local_processes_train(tmp_path):
  cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}
  (tmp_path / "texts").mkdir()
  for i in range(10):
    (tmp_path / "texts" / f"{i}.txt").write_text("a memory of a memory\n" * 40)
  done = _launch(
    "local.sh",
    *(
      "--config=configs/quickstart.py",
      f"--workdir={tmp_path / 'run'}",
      f"--python={sys.executable}",
      "--",
    ),
    *(
      "--config.data.source=text",
      f"--config.data.paths={tmp_path / 'texts'}",
      "--config.data.validation_fraction=0.3",
    ),
    *("--config.data.length=16", "--config.model.pattern=attention", "--config.model.d_model=16"),
    *("--config.train.steps=3", "--config.train.sample_length=0"),
    cwd=ROOT,
    env=os.environ | cache,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "2 x cpu (data=2)" in done.stdout
  assert [record["step"] for record in metrics.read(tmp_path / "run")] == [1, 2, 3]
