#!/usr/bin/env bash
# DeepSpeed's own launcher over a hostfile (pdsh or ssh), or on this machine alone.
#
#   DS_CONFIG=ds.json HOSTFILE=hostfile launch/hostfile.sh train.py --epochs 3
#
# Assumes: password-less ssh from here to every host, the same paths there; pdsh, unless DEEPSPEED_ARGS says otherwise.
# Variables: see preflight.sh, and
#   HOSTFILE         "node1 slots=8" lines                            (default: none, this machine)
#   DEEPSPEED_ARGS   more arguments for the launcher, e.g. "--launcher openmpi" or "--num_accelerators 2"
set -euo pipefail
LAUNCH_DIR=${LAUNCH_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
source "$LAUNCH_DIR/preflight.sh"
[[ -z $CONTAINER ]] || die "the deepspeed launcher starts Python itself: run this script inside the container"

check_config
build_command "$@"
check_machine
set_caches "$$"
# Remote ranks get no environment but what this file lists.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
for name in TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR TORCH_EXTENSIONS_DIR OMP_NUM_THREADS NCCL_DEBUG NCCL_SOCKET_IFNAME; do
  [[ -z ${!name+set} ]] || echo "$name=${!name}" >>"$DS_ENV_FILE"
done
read -ra EXTRA <<<"${DEEPSPEED_ARGS:-}"
MASTER_PORT=${MASTER_PORT:-$((20000 + $$ % 20000))}
SCRIPT=("${COMMAND[@]:2}") # the launcher brings its own `python -u`

run_until_done deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} --master_port "$MASTER_PORT" "${EXTRA[@]}" "${SCRIPT[@]}"
