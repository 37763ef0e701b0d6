#!/usr/bin/env bash
# DeepSpeed's own launcher over a hostfile (pdsh or ssh), or on this machine alone.
#
#   DS_CONFIG=ds.json HOSTFILE=hostfile launch/hostfile.sh train.py --epochs 3
#
# Assumes: password-less ssh from here to every host, the same paths there; pdsh, unless DEEPSPEED_ARGS says otherwise.
# Variables: see preflight.sh, node_env.sh and supervise.sh, and
#   HOSTFILE         "node1 slots=8" lines                            (default: none, this machine)
#   DEEPSPEED_ARGS   more arguments for the launcher, e.g. "--launcher openmpi" or "--num_accelerators 2"
#   MASTER_ADDR      address of the first host that all others reach                  (default: its name in HOSTFILE)
#   LOG_DIR          folder for one log per rank, as DeepSpeed writes them            (default: none, all write here)
set -euo pipefail
LAUNCH_DIR=${LAUNCH_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
# shellcheck source=launch/preflight.sh
source "$LAUNCH_DIR/preflight.sh"
[[ -z $CONTAINER ]] || die "the deepspeed launcher starts Python itself: run this script inside the container"
read -ra EXTRA <<<"${DEEPSPEED_ARGS:-}"
HOSTS=1 FIRST_HOST=
if [[ -n ${HOSTFILE:-} ]]; then
  [[ -r $HOSTFILE ]] || die "cannot read HOSTFILE=$HOSTFILE"
  HOSTS=$(sed -e 's/#.*//' "$HOSTFILE" | grep -c '[^[:space:]]' || true)
  FIRST_HOST=$(sed -e 's/#.*//' "$HOSTFILE" | awk 'NF && !seen++ { print $1 }')
  [[ -n $FIRST_HOST ]] || die "no host in $HOSTFILE"
fi
BY_PDSH=$([[ " ${EXTRA[*]} " == *" --launcher"* && " ${EXTRA[*]} " != *pdsh* ]] && echo 0 || echo 1)
if ((HOSTS > 1 && BY_PDSH)) && [[ "$PWD ${1:-}" == *[[:space:]]*[[:space:]]* || $PWD == *[[:space:]]* || ${1:-} == *[[:space:]]* ]]; then
  die "pdsh hands its words to a shell on the other hosts, where a folder or script with a space falls apart ($PWD, ${1:-}); rename it or link to it"
fi

check_config
build_command "$@"
GPUS=$(count_gpus)
[[ -n ${LOG_DIR:-} ]] || LOG_DIR=
set_node_env "$((GPUS > 0 ? GPUS : 1))"
set_caches
[[ -z $LOG_DIR ]] || { set_logs "$$" && EXTRA=(--enable_each_rank_log "$LOG_DIR" "${EXTRA[@]}"); }
set_rendezvous "${FIRST_HOST:-127.0.0.1}" "$$"
# Remote ranks get no environment but what this file lists. For pdsh DeepSpeed puts
# a value into double quotes, in which a shell still reads some characters.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
set_carried
for name in "${CARRIED[@]}"; do
  [[ $name != MASTER_* && $name != LOG_DIR ]] || continue
  value=${!name}
  [[ $value != *$'\n'* ]] || { say "$name has several lines, which DeepSpeed's launcher cannot carry: left out"; continue; }
  # shellcheck disable=SC2001 # a class of characters
  if ((HOSTS > 1 && BY_PDSH)); then value=$(sed -e 's/[\\"$`]/\\&/g' <<<"$value"); fi
  printf '%s=%s\n' "$name" "$value" >>"$DS_ENV_FILE"
done
SKIPPED=2 # the launcher brings its own `python -u`
LINE=(deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} ${HOSTFILE:+--master_addr "$MASTER_ADDR"} --master_port "$MASTER_PORT" "${EXTRA[@]}")

# The launcher's child, or pdsh on the other hosts: `deepspeed` passes a TERM on only there.
tell_ranks() {
  signal_local_ranks "$1" || kill -TERM "$LAUNCHER_PID"
}
if ((HOSTS > 1)); then
  DOCTOR=(--module ds_fp8.cli.doctor "$DS_CONFIG" "${DOCTOR_EXTRA[@]}")
  check_nodes "${LINE[@]}"
else
  check_machine
fi

run_until_done "${LINE[@]}" "${COMMAND[@]:SKIPPED}"
