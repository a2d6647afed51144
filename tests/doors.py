"""Doors in processes that start at once: each is forked from this one, which has imported all but the doors.

Started as a program. A line of standard input is {"module", "arguments", "folder", "input", "out", "err"} as JSON: the
door or a program's path, its command line, the folder it is started in, its standard input, and files for what it
prints. The answer is a line with its exit status.
"""

import importlib
import json
import os
import runpy
import sys
import traceback

import jax

for package, modules in {
  "ablation": ("grid", "report", "runner"),
  "data": ("preparation",),
  "evaluation": ("tasks",),
  "inference": ("export", "prompts"),
  "training": ("loop", "replay"),
}.items():
  for module in modules:
    importlib.import_module(f"mc_jax.{package}.{module}")


def run(job):
  for number, path in ((1, job["out"]), (2, job["err"])):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
  reading, writing = os.pipe()
  os.write(writing, job["input"].encode())
  os.close(writing)
  os.dup2(reading, 0)
  streams = (open(number, mode, closefd=False) for number, mode in enumerate("rww"))  # noqa: SIM115
  sys.stdin, sys.stdout, sys.stderr = streams
  os.chdir(job["folder"])
  jax.config.update("jax_compilation_cache_dir", job["cache"])
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  sys.argv = [job["module"], *job["arguments"]]
  if job["module"].endswith(".py"):
    runpy.run_path(job["module"], run_name="__main__")
  else:
    runpy.run_module(job["module"], run_name="__main__", alter_sys=True)


for line in sys.stdin:
  process = os.fork()
  if not process:
    try:
      run(json.loads(line))
      status = 0
    except SystemExit as end:
      if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
      status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
      traceback.print_exc()
      status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
