#!/usr/bin/env bash
# Kubernetes: runs in every pod of the Indexed Job in kubernetes.yaml; torchrun starts one process per GPU of the pod.
#
# Assumes: pods of one Indexed Job behind a headless service, checkpoints on a shared volume. A pod that is evicted comes
# back with the same index and goes on from the latest checkpoint. Variables: see preflight.sh, and
#   JOB_NAME, SERVICE     the Job and the headless service                 (default: ds-fp8, JOB_NAME)
#   NODES                 pods                                             (default: 1)
#   GPUS_PER_NODE         processes per pod                                (default: the GPUs here, else 1)
#   JOB_COMPLETION_INDEX  set by Kubernetes
set -euo pipefail
LAUNCH_DIR=${LAUNCH_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
source "$LAUNCH_DIR/preflight.sh"
: "${JOB_NAME:=ds-fp8}" "${SERVICE:=$JOB_NAME}" "${NODES:=1}" "${JOB_COMPLETION_INDEX:=0}"

check_config
build_command "$@"
check_machine
set_caches "$JOB_NAME"
GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || GPUS=0
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS > 0 ? GPUS : 1))}
MASTER_PORT=${MASTER_PORT:-29500} # a pod has its network for itself
set_rendezvous "$JOB_NAME-0.$SERVICE" "$MASTER_PORT"
mkdir -p "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR" "$TORCH_EXTENSIONS_DIR"
# Kubernetes asks with TERM before it kills: the ranks must hear it, not only this shell.
trap 'kill -TERM "$LAUNCHER_PID"' TERM
SCRIPT=("${COMMAND[@]:${#CONTAINER_PREFIX[@]}+2}") # torchrun brings its own `python -u`

run_until_done "${CONTAINER_PREFIX[@]}" torchrun --nnodes "$NODES" --node_rank "$JOB_COMPLETION_INDEX" --nproc_per_node "$GPUS_PER_NODE" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "${SCRIPT[@]}"
