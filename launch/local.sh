#!/usr/bin/env bash
# Trains on this machine's CPU as several hosts would: one process for each, joined by jax.distributed.
#
#   launch/local.sh --config=configs/quickstart.py --workdir=runs/local [options] [-- flags of mc_jax.train]
#
#   --config=FILE       the run
#   --workdir=WHERE     a folder, or gs://BUCKET/FOLDER
#   --processes=N       hosts (2)
#   --devices=N         virtual devices of each (1). With more than one XLA:CPU may hang on a busy machine: its collectives
#                       between processes want a thread for each
#   --restarts=N        how often all are started again when one has died (10); they go on from the last checkpoint
#   --python=PROGRAM    that has mc_jax installed (python)
#   --dry-run           only print what would be done
#
# Ctrl-C, SIGTERM or a closed terminal stops all with a checkpoint. Ends with the status of the processes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options="config workdir processes devices restarts python" switches="dry-run"
config='' workdir='' processes=2 devices=1 restarts=10 python=python dry_run=''
parse "$@"
require config workdir
require_number processes devices restarts

pids=() stopping=
trap 'stopping=yes; kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM HUP

# Starts all processes and waits for them; sets `code` to the worst of their statuses, 2 (settings) before others.
attempt() {
  local port=$((20000 + RANDOM % 12000)) i pid status
  local command=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" "$python" -m mc_jax.train "--config=$config"
    "--workdir=$workdir" "--coordinator=localhost:$port" "--num_processes=$processes" --heartbeat_timeout_seconds=15)
  pids=() code=0
  for ((i = 0; i < processes; i++)); do
    show "${command[@]}" "--process_id=$i" "${rest[@]}"
    [[ -z $dry_run ]] || continue
    "${command[@]}" "--process_id=$i" "${rest[@]}" &
    pids+=($!)
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    status=0
    wait "$pid" || status=$?
    while kill -0 "$pid" 2>/dev/null; do # a signal to this script ended the waiting, not the process
      status=0
      wait "$pid" || status=$?
    done
    ((status == 0 || code == 2)) || code=$status
  done
}

attempt
if [[ -n $dry_run ]]; then
  echo "  up to $restarts times again if one of them dies" >&2
fi
for ((again = 1; again <= restarts; again++)); do
  [[ $code != 0 && $code != 2 && -z $stopping ]] || break
  printf 'a process ended with status %s: restart %s of %s\n' "$code" "$again" "$restarts" >&2
  attempt
done
exit "$code"
