#!/usr/bin/env bash
# Kubernetes: runs in every pod of the Indexed Job in kubernetes.yaml; torchrun starts one process per GPU of the pod.
#
# Assumes: pods of one Indexed Job behind a headless service, checkpoints on a shared volume. A pod that is evicted comes
# back with the same index and goes on from the newest complete checkpoint. Variables: see preflight.sh, node_env.sh and
# supervise.sh, and
#   JOB_NAME, SERVICE     the Job and the headless service                 (default: ds-fp8, JOB_NAME)
#   NODES                 pods                                             (default: 1)
#   GPUS_PER_NODE         processes per pod                                (default: the GPUs here, else 1)
#   JOB_COMPLETION_INDEX  set by Kubernetes
#   GRACE_S               below terminationGracePeriodSeconds of the pod   (default: 200)
#   RETRIES               starts in this pod after a crash; the others' ranks wait for it          (default: 0, the Job's)
set -euo pipefail
LAUNCH_DIR=${LAUNCH_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
: "${RETRIES:=0}"
# shellcheck source=launch/preflight.sh
source "$LAUNCH_DIR/preflight.sh"
: "${JOB_NAME:=ds-fp8}" "${SERVICE:=$JOB_NAME}" "${NODES:=1}" "${JOB_COMPLETION_INDEX:=0}"

check_config
build_command "$@"
GPUS=$(count_gpus)
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS > 0 ? GPUS : 1))}
MASTER_PORT=${MASTER_PORT:-29500} # a pod has its network for itself
[[ -n ${LOG_DIR+set} ]] || LOG_DIR= # the pod's log is the one that outlives it
set_node_env "$GPUS_PER_NODE"
set_caches
set_rendezvous "$JOB_NAME-0.$SERVICE" "$MASTER_PORT"
(umask 077 && mkdir -p "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR" "$TORCH_EXTENSIONS_DIR")
if [[ -n $LOG_DIR ]]; then
  set_logs "$JOB_NAME"
  export PET_LOG_DIR=$LOG_DIR PET_REDIRECTS=${PET_REDIRECTS:-3} # torchrun's own options, by the environment
fi
SKIPPED=$((${#CONTAINER_PREFIX[@]} + 2)) # torchrun brings its own `python -u`
if ((NODES > 1)); then
  RANK=$JOB_COMPLETION_INDEX LOCAL_RANK=0 WORLD_SIZE=$NODES check_nodes
else
  check_machine
fi

# Kubernetes sends TERM to this shell alone. torchrun would give the ranks 30 s: they are told themselves, and it waits.
run_until_done "${CONTAINER_PREFIX[@]}" torchrun --nnodes "$NODES" --node_rank "$JOB_COMPLETION_INDEX" --nproc_per_node "$GPUS_PER_NODE" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "${COMMAND[@]:SKIPPED}"
