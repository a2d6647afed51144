#!/usr/bin/env bash
# Trains on a Cloud TPU: asks for it (queued resources), waits, installs this checkout's HEAD on all its hosts, and runs.
#
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --type=v5litepod-256 --config=configs/titans_1b.py \
#     --workdir=gs://BUCKET/FOLDER [options] [-- flags of mc_jax.train]
#
#   --name=NAME         of the queued resource and its TPU
#   --zone=ZONE         such as us-east5-a
#   --type=TYPE         accelerator type, such as v5litepod-256, v5p-128, v6e-256
#   --config=FILE       the run, by its path in the repository
#   --workdir=BUCKET    gs://BUCKET/FOLDER; a run goes on from the checkpoint that is there
#   --project=PROJECT   (gcloud's default)
#   --runtime=VERSION   of the TPU software (by the type)
#   --spot              cheaper capacity that can be taken away
#   --restarts=N        how often to begin again after a preemption or failure (100)
#   --keep              leave the TPU when the run is complete, instead of deleting it
#   --dry-run           only print what would be done
#
# Leave it running (tmux, or a small VM): it watches the run and, when the TPU is preempted, asks for another and goes
# on. Started again, it finds the TPU, ends what runs there with a checkpoint, and goes on from it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options="name zone type config workdir project runtime restarts" switches="spot keep dry-run"
name='' zone='' type='' config='' workdir='' project='' runtime='' restarts=100 spot='' keep='' dry_run=''
parse "$@"
require name zone type config workdir
require_number restarts
require_bucket
if [[ -z $runtime ]]; then
  case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v4-*) runtime=tpu-ubuntu2204-base ;;
    *) die "--type=$type: no --runtime is known for it; see cloud.google.com/tpu/docs/runtimes" ;;
  esac
fi

where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")
tpus=(gcloud compute tpus)
archive=$(mktemp -d)/mc_jax.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT

state() { # of the queued resource; empty if there is none
  "${tpus[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || true
}

create() {
  run "${tpus[@]}" queued-resources create "$name" "--node-id=$name" "${where[@]}" "--accelerator-type=$type" \
    "--runtime-version=$runtime" ${spot:+--spot}
}

delete() {
  run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
}

on_all_hosts() {
  run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all "--command=$1"
}

# An earlier run, left by a lost connection, stops with a checkpoint.
stop='if [ -f train.pid ] && kill "$(cat train.pid)" 2>/dev/null; then tail --pid="$(cat train.pid)" -f /dev/null; fi'

install() {
  run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
  run "${tpus[@]}" tpu-vm scp "$archive" "$name:mc_jax.tar.gz" "${where[@]}" --worker=all
  on_all_hosts "set -e; $stop"'; rm -rf mc_jax; mkdir mc_jax; tar -xzf mc_jax.tar.gz -C mc_jax
    python3 -m pip install --quiet --user uv; export PATH="$HOME/.local/bin:$PATH"
    uv venv --quiet --allow-existing --python 3.11 mc_jax_env
    uv pip install --quiet --python mc_jax_env/bin/python "./mc_jax[tpu,gcs,data]"'
}

train() {
  local command
  printf -v command ' %q' "--config=$config" "--workdir=$workdir" "${rest[@]}"
  on_all_hosts "$stop"'; cd mc_jax; rm -f ../train.status
    ../mc_jax_env/bin/python -m mc_jax.train'"$command"' & echo $! > ../train.pid
    wait $!; status=$?; echo $status > ../train.status; exit $status'
}

# Whether the settings cannot work or the run diverged: to begin again would not help.
hopeless() {
  [[ $("${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=0 --command='cat train.status' 2>/dev/null) == 2 ]]
}

if [[ -n $dry_run ]]; then
  create
  echo "  until it is ACTIVE; SUSPENDED (preempted) or FAILED: delete it, as below, and begin again" >&2
  install
  train
  echo "  up to $restarts times again if it fails, with a new TPU if this one was preempted" >&2
  [[ -n $keep ]] || delete
  exit
fi

installed=
for ((attempt = 0; attempt <= restarts; )); do
  case $(state) in
    '')
      create
      installed=
      ;;
    SUSPENDED | FAILED)
      delete
      ((attempt += 1))
      ;;
    ACTIVE)
      if [[ -n $installed ]] || install; then
        installed=yes
        if train; then
          [[ -n $keep ]] || delete
          exit 0
        fi
        ! hopeless || die "the run cannot go on, see above; the TPU $name is still there"
      fi
      ((attempt += 1))
      echo "the run ended early: attempt $attempt of $restarts follows" >&2
      sleep 30 # until a preemption shows in the state
      ;;
    *) sleep 30 ;; # ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, DELETING
  esac
done
die "given up after $restarts restarts; the TPU $name may still be there"
