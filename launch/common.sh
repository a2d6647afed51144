# Sourced by the scripts beside it: options, errors, and commands that a dry run only prints.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# The comment at the head of a script is its usage.
usage() {
  awk 'NR > 1 && !/^#/ {exit} NR > 1 {sub(/^# ?/, ""); print}' "$0"
}

# parse "$@": sets a variable for every option and switch named in `options` and `switches` (--dry-run: dry_run), and
# `rest` to what follows "--". Values are given as --name=value or --name value. (Locals must not hide an option.)
parse() {
  local _argument _option
  rest=()
  while (($#)); do
    _argument=$1 _option=${1#--}
    _option=${_option%%=*}
    shift
    case $_argument in
      --help) usage && exit 0 ;;
      --) rest=("$@") && break ;;
    esac
    if [[ $_argument == --* && " $switches " == *" ${_argument#--} "* ]]; then
      printf -v "${_option//-/_}" yes
    elif [[ $_argument == --*=* && " $options " == *" $_option "* ]]; then
      printf -v "${_option//-/_}" %s "${_argument#*=}"
    elif [[ $_argument == --* && " $options " == *" $_option "* && $# -gt 0 ]]; then
      printf -v "${_option//-/_}" %s "$1"
      shift
    else
      die "not an option: $_argument. There are --${options// /, --}, --${switches// /, --} and --help; flags of \
mc_jax.train follow --"
    fi
  done
}

# require NAME...: options that must have a value.
require() {
  local _option _variable
  for _option in "$@"; do
    _variable=${_option//-/_}
    [[ -n ${!_variable:-} ]] || die "--$_option is missing; --help tells what it is"
  done
}

require_number() {
  local _option _variable
  for _option in "$@"; do
    _variable=${_option//-/_}
    [[ ${!_variable} =~ ^[1-9][0-9]*$ ]] || die "--$_option must be a whole number from 1, got ${!_variable}"
  done
}

require_bucket() {
  [[ $workdir == gs://?* ]] || die "--workdir must be gs://BUCKET/FOLDER, which all hosts see, got $workdir"
}

# show COMMAND...: prints it as it could be typed.
show() {
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
}

# run COMMAND...: shows it, and runs it unless this is a dry run.
run() {
  show "$@"
  [[ -n ${dry_run:-} ]] || "$@"
}
