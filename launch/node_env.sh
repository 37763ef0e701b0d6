# shellcheck shell=bash
# The environment of the ranks, the same under every launcher. Sourced by preflight.sh.
#
#   CARRY            more variables for the ranks on other nodes, beside those of CARRIED_PREFIXES    (default: none)
#   MASTER_ADDR, MASTER_PORT   rendezvous                                      (default: first node; by the job id)
#   NODE_CACHE       node-local folder for compiled kernels, shared by jobs of one environment
#                                                                              (default: under /tmp, by user and Python)
#   CACHE_DAYS       caches of other environments are removed after so many days   (default: 14; 0: never)
#   LOG_DIR          folder for one log per rank; rank 0 writes to the job's output. Empty: all write there
#                                                                              (default: logs/<job>)
#   CPUS_PER_RANK    for OMP_NUM_THREADS                                       (default: cores of a node by its ranks)
#   NUMA_BIND=1      bind each rank to the NUMA node of its GPU (needs numactl)                       (default: 0)
#   FABRIC           efa, infiniband or ethernet: the network's usual variables, where you set none   (default: none)
#   DEBUG_HANGS=0    leave out what names a hanging collective (stacks of all ranks on an NCCL timeout)  (default: 1)

CARRIED_PREFIXES=(NCCL_ GLOO_ FI_ UCX_ HF_ WANDB_ TORCH_ TORCHINDUCTOR_ PYTORCH_ TRITON_ OMP_ MKL_ DS_ DEEPSPEED_ CUDA_
  TOKENIZERS_ TRANSFORMERS_ MLFLOW_ COMET_ CLEARML_ NVTE_ RDMAV_ EFA_)
CARRIED_NAMES=(MASTER_ADDR MASTER_PORT NODE_CACHE CACHE_DAYS LOG_DIR NUMA_BIND TELL_EXIT CHECKPOINT_DIR PATH PYTHONPATH LD_LIBRARY_PATH
  VIRTUAL_ENV PYTHONFAULTHANDLER PYTHONUNBUFFERED HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy SKIP_CHECK)

# Sets CARRIED: every exported variable that ranks on other nodes need. mpirun and pdsh carry none by themselves.
set_carried() {
  local more name prefix
  read -ra more <<<"${CARRY:-}"
  CARRIED=()
  for name in "${CARRIED_NAMES[@]}" "${more[@]}"; do
    [[ $(declare -p "$name" 2>/dev/null) != "declare -x"* ]] || CARRIED+=("$name")
  done
  while IFS= read -r name; do
    [[ $name != DS_ENV_FILE && " ${CARRIED[*]} " != *" $name "* ]] || continue
    for prefix in "${CARRIED_PREFIXES[@]}"; do
      [[ $name != "$prefix"* ]] || { CARRIED+=("$name"); break; }
    done
  done < <(compgen -e)
  for name in "${more[@]}"; do [[ -n ${!name+set} ]] || say "CARRY names $name, which is not set"; done
}

# Kernels are compiled at first use; on a shared home, thousands of ranks would wait for one lock. One folder for each
# environment, so that the next job finds what this one compiled: its packages change, their folder's time changes.
set_caches() {
  local interpreter version
  # shellcheck disable=SC2153 # PYTHON is preflight.sh's
  interpreter=$(command -v "$PYTHON" || true)
  version=$({
    echo "$CONTAINER ${CONTAINER_IMAGE:-}"
    stat -Lc '%n %Y' "$interpreter" "${interpreter%/*}"/../lib/python3*/{site,dist}-packages /usr/lib/python3/dist-packages 2>/dev/null || true
  } | cksum | cut -d ' ' -f 1)
  export CACHE_DAYS=${CACHE_DAYS:-14}
  export NODE_CACHE=${NODE_CACHE:-${TMPDIR:-/tmp}/ds_fp8-${USER:-$(id -un)}/env-$version}
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$NODE_CACHE/triton}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$NODE_CACHE/inductor}
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$NODE_CACHE/torch_extensions}
}

# Threads, the network's defaults, and what makes a hang speak. Argument: ranks on one node.
set_node_env() {
  local cores ranks=${1:-1}
  cores=$(nproc 2>/dev/null || echo 1)
  CPUS_PER_RANK=${CPUS_PER_RANK:-$((cores / ranks > 0 ? cores / ranks : 1))}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS_PER_RANK} NUMA_BIND=${NUMA_BIND:-0}
  export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1} # a rank that is aborted shows the stack of each of its threads
  if [[ ${DEBUG_HANGS:-1} == 1 ]]; then
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000} TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    [[ -z ${LOG_DIR:-} ]] || export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$LOG_DIR/nccl_trace_rank_}
  fi
  case ${FABRIC:-} in
    "") ;;
    efa) export FI_PROVIDER=${FI_PROVIDER:-efa} FI_EFA_USE_HUGE_PAGE=${FI_EFA_USE_HUGE_PAGE:-0} RDMAV_FORK_SAFE=${RDMAV_FORK_SAFE:-1} ;;
    infiniband) export NCCL_IB_DISABLE=${NCCL_IB_DISABLE:-0} NCCL_NET_GDR_LEVEL=${NCCL_NET_GDR_LEVEL:-PHB} UCX_TLS=${UCX_TLS:-rc,cuda_copy,cuda_ipc,sm,self} ;;
    ethernet) export NCCL_IB_DISABLE=${NCCL_IB_DISABLE:-1} NCCL_NET=${NCCL_NET:-Socket} ;;
    *) die "FABRIC=$FABRIC: efa, infiniband or ethernet" ;;
  esac
}

# Argument: a name for this job.
set_logs() {
  [[ -n ${LOG_DIR+set} ]] || LOG_DIR=$PWD/logs/$1
  export LOG_DIR
  [[ -z $LOG_DIR ]] || { mkdir -p "$LOG_DIR" && LOG_DIR=$(cd "$LOG_DIR" && pwd) && say "each rank but 0 writes to $LOG_DIR/rank_<n>.log"; }
}

# Two jobs on one node must not meet: the port follows the job id, below the ports that the kernel hands out itself.
# Arguments: the first node, the job id.
set_rendezvous() {
  local low high base=20000 size=12000 tries=0
  if read -r low high 2>/dev/null </proc/sys/net/ipv4/ip_local_port_range; then
    if ((low >= 21000)); then size=$((low - 20000 < 12000 ? low - 20000 : 12000)); elif ((high <= 64000)); then
      base=$((high + 1)) size=$((65535 - high))
    fi
  fi
  export MASTER_ADDR=${MASTER_ADDR:-$1}
  if [[ -z ${MASTER_PORT:-} ]]; then
    MASTER_PORT=$((base + 10#0${2//[^0-9]/} % size))
    # Taken, e.g. by an array task with the same number: the next one. Only this machine can be asked.
    while ((tries++ < 50)) && (: </dev/tcp/127.0.0.1/$MASTER_PORT) 2>/dev/null; do
      MASTER_PORT=$((MASTER_PORT + 1 < base + size ? MASTER_PORT + 1 : base))
    done
  fi
  export MASTER_PORT
  say "rendezvous at $MASTER_ADDR:$MASTER_PORT"
}

# What a container must see: one absolute folder a line.
needed_folders() {
  local path
  for path in "$PWD" "$LAUNCH_DIR" "$(dirname "$DS_CONFIG")" "${CHECKPOINT_DIR:-}" "${LOG_DIR:-}" "${HF_HOME:-}" "${DATA_DIR:-}"; do
    [[ -z $path ]] || realpath -m -- "$path"
  done | awk '!seen[$0]++'
}

# The first line of the text on stdin. Reads all of it: `head -n 1` would end a writer of many lines by SIGPIPE.
first_line() { awk 'NR == 1'; }

count_gpus() {
  local gpus
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
  echo "$gpus"
}
