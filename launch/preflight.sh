# What every launch script does before the launcher line, and how it waits for it. Sourced, never run.
#
# Needs bash 4.4. Reads, all from the environment:
#   DS_CONFIG        the DeepSpeed JSON                                        (required)
#   CONFIG_FLAG      how the script takes it                                   (default: --deepspeed_config)
#   PYTHON           interpreter on the nodes                                  (default: python)
#   CONTAINER        prefix that runs a command in a container, e.g. "apptainer exec --nv image.sif"   (default: none)
#   CHECKPOINT_DIR   folder with DeepSpeed's `latest` file                     (default: none, nothing to resume)
#   RESUME_ARGS      arguments for the script when there is a checkpoint       (default: none, it finds it itself)
#   MASTER_PORT      rendezvous port                                           (default: from the job id)
#   NODE_CACHE       node-local folder for compiled kernels                    (default: under /tmp, by user and job)
#   DOCTOR_ARGS      more for `ds_fp8 doctor`; "--other-door" if the script imports ds_fp8 itself   (default: none)
#   SKIP_CHECK=1     run neither `ds_fp8 check` nor `ds_fp8 doctor`

say() { echo "launch: $*" >&2; }
die() { say "$*"; exit 2; }

: "${DS_CONFIG:?launch: set DS_CONFIG to the DeepSpeed JSON}"
: "${CONFIG_FLAG:=--deepspeed_config}" "${PYTHON:=python}" "${CONTAINER:=}" "${RESUME_ARGS:=}"
read -ra CONTAINER_PREFIX <<<"$CONTAINER"

# A bad key must cost a second here, not the start of all nodes. Arguments: a prefix that reaches the environment.
check_config() {
  [[ ${SKIP_CHECK:-0} == 1 ]] && return
  "$@" "${CONTAINER_PREFIX[@]}" ds_fp8 check "$DS_CONFIG" || die "ds_fp8 check refuses $DS_CONFIG, nothing was started"
}

# A Python without the plugin trains on in 16 bits and says nothing, so it is asked for here, where the ranks will run:
# the door, versions, DeepSpeed's seams. Arguments: a prefix that reaches the environment.
check_machine() {
  [[ ${SKIP_CHECK:-0} == 1 ]] && return
  local more
  read -ra more <<<"${DOCTOR_ARGS:-}"
  "$@" "${CONTAINER_PREFIX[@]}" "$PYTHON" -m ds_fp8.cli.main doctor "$DS_CONFIG" "${more[@]}" ||
    die "ds_fp8 doctor: $PYTHON on $(hostname) cannot run $DS_CONFIG, nothing was started"
}

# Sets COMMAND: the interpreter, the script and its arguments, the configuration, and what resuming needs.
build_command() {
  (($# > 0)) || die "which script? usage: DS_CONFIG=ds.json $0 train.py [arguments]"
  COMMAND=("${CONTAINER_PREFIX[@]}" "$PYTHON" -u "$@" "$CONFIG_FLAG" "$DS_CONFIG")
  local tag resume
  [[ -n ${CHECKPOINT_DIR:-} && -f $CHECKPOINT_DIR/latest ]] || return 0
  tag=$(<"$CHECKPOINT_DIR/latest")
  [[ -d $CHECKPOINT_DIR/$tag ]] || die "$CHECKPOINT_DIR/latest names '$tag', which is not there; repair or remove it"
  read -ra resume <<<"$RESUME_ARGS"
  COMMAND+=("${resume[@]}")
  say "resuming from $CHECKPOINT_DIR/$tag"
}

# Kernels are compiled at first use; on a shared home, thousands of ranks would wait for one lock.
set_caches() {
  export NODE_CACHE=${NODE_CACHE:-${TMPDIR:-/tmp}/ds_fp8-${USER:-$(id -un)}-${1:-0}}
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$NODE_CACHE/triton}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$NODE_CACHE/inductor}
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$NODE_CACHE/torch_extensions}
}

# Two jobs on one node must not meet: the port follows the job id, in the range that nobody reserves.
set_rendezvous() {
  export MASTER_ADDR=${MASTER_ADDR:-$1}
  export MASTER_PORT=${MASTER_PORT:-$((20000 + ${2//[^0-9]/} % 20000))}
  say "rendezvous at $MASTER_ADDR:$MASTER_PORT"
}

# Runs the launcher in the background, because bash handles a signal only between commands, and waits to the end.
run_until_done() {
  local code
  "$@" &
  LAUNCHER_PID=$!
  while true; do
    code=0
    wait "$LAUNCHER_PID" || code=$?
    # Above 128 either the launcher died of a signal, or a trap interrupted the wait and the launcher still runs.
    ((code > 128)) && kill -0 "$LAUNCHER_PID" 2>/dev/null || return "$code"
  done
}
