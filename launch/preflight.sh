# shellcheck shell=bash
# What every launch script does before its launcher line: check, doctor, resume. Sourced, never run.
#
# Needs bash 4.4. Reads, all from the environment:
#   DS_CONFIG        the DeepSpeed JSON                                        (required)
#   CONFIG_FLAG      how the script takes it                                   (default: --deepspeed_config)
#   PYTHON           interpreter on the nodes                                  (default: python)
#   CONTAINER        prefix that runs a command in a container, e.g. "apptainer exec --nv image.sif"   (default: none)
#   CHECKPOINT_DIR   folder with DeepSpeed's `latest` file                     (default: none, nothing to resume)
#   RESUME_ARGS      arguments for the script when there is a checkpoint; {tag} and {dir} are put in
#                                                                              (default: none, it finds it itself)
#   KEEP_LATEST=1    never repair `latest`; stop where it names an incomplete checkpoint
#   DOCTOR_ARGS      more for `ds_fp8 doctor`; "--other-activation" if the script imports ds_fp8 itself   (default: none)
#   DOCTOR_S         seconds that doctor and the health check of all nodes may take                 (default: 300)
#   SKIP_CHECK=1     run neither `ds_fp8 check` nor `ds_fp8 doctor`
# and what node_env.sh and supervise.sh list.
#
# Exit code 2, here as in every script: configuration or usage. Starting again would not help, so nobody does.

say() { echo "launch: $*" >&2; }
die() { say "$*"; exit 2; }

[[ -n ${DS_CONFIG:-} ]] || die "set DS_CONFIG to the DeepSpeed JSON"
: "${CONFIG_FLAG:=--deepspeed_config}" "${PYTHON:=python}" "${CONTAINER:=}" "${RESUME_ARGS:=}" "${DOCTOR_S:=300}"
read -ra CONTAINER_PREFIX <<<"$CONTAINER"
read -ra DOCTOR_EXTRA <<<"${DOCTOR_ARGS:-}"
DOCTOR=("${CONTAINER_PREFIX[@]}" "$PYTHON" -m ds_fp8.cli.main doctor "$DS_CONFIG" "${DOCTOR_EXTRA[@]}")
# shellcheck source=launch/node_env.sh
source "$LAUNCH_DIR/node_env.sh"
# shellcheck source=launch/supervise.sh
source "$LAUNCH_DIR/supervise.sh"

# A bad key must cost a second here, not the start of all nodes. Arguments: a prefix that reaches the environment.
check_config() {
  [[ ${SKIP_CHECK:-0} == 1 ]] && return
  local code=0
  "$@" "${CONTAINER_PREFIX[@]}" ds_fp8 check "$DS_CONFIG" || code=$?
  case $code in
    0) ;;
    1) die "ds_fp8 check refuses $DS_CONFIG, nothing was started" ;;
    2) die "ds_fp8 check cannot read $DS_CONFIG, nothing was started" ;;
    *) die "ds_fp8 check could not run (exit code $code: is ds_fp8 installed here? SKIP_CHECK=1 goes without), nothing was started" ;;
  esac
}

# A Python without the plugin trains on in 16 bits and says nothing, so it is asked for here, where the ranks will run:
# the activation hook, versions, DeepSpeed's private names. Arguments: a prefix that reaches the environment.
check_machine() {
  [[ ${SKIP_CHECK:-0} == 1 ]] && return
  judge_doctor "$(hostname)" timeout -k 10 "$DOCTOR_S" "$@" "${DOCTOR[@]}"
}

# The same on every node, together with GPU health and one small all-reduce over all ranks: a job of many nodes fails
# with one sick one. Arguments: the launcher line up to the command of a rank.
check_nodes() {
  [[ ${SKIP_CHECK:-0} == 1 ]] && return
  judge_doctor "one of the nodes" timeout -k 10 "$DOCTOR_S" "$@" "${DOCTOR[@]}" --every-rank --within "$DOCTOR_S"
}

judge_doctor() { # whose Python, and the command
  local code=0 who=$1
  shift
  LOG_DIR='' "$@" || code=$?
  case $code in
    0) ;;
    124 | 137) die "ds_fp8 doctor: no answer within $DOCTOR_S s (DOCTOR_S): a node is down or does not reach the others, nothing was started" ;;
    *) die "ds_fp8 doctor: $PYTHON on $who cannot run $DS_CONFIG, nothing was started" ;;
  esac
}

# Sets COMMAND: the interpreter, the script and its arguments, the configuration, and what resuming needs.
build_command() {
  (($# > 0)) || die "which script? usage: DS_CONFIG=ds.json $0 train.py [arguments]"
  SCRIPT_WITH_ARGUMENTS=("$@")
  COMMAND=("${CONTAINER_PREFIX[@]}" "$PYTHON" -u "$@" "$CONFIG_FLAG" "$DS_CONFIG")
  find_checkpoint
  [[ -n $RESUME_TAG ]] || return 0
  local resume
  read -ra resume <<<"$RESUME_ARGS"
  resume=("${resume[@]//\{tag\}/$RESUME_TAG}")
  COMMAND+=("${resume[@]//\{dir\}/$CHECKPOINT_DIR}")
  say "resuming from $CHECKPOINT_DIR/$RESUME_TAG"
}

# Sets RESUME_TAG: the newest complete checkpoint, or nothing. `latest` may be empty after a full disk, or name one that
# a rank was killed in; then it is made to name a complete one, so that a script that just loads does the right thing.
find_checkpoint() {
  RESUME_TAG=
  [[ -n ${CHECKPOINT_DIR:-} && -d $CHECKPOINT_DIR ]] || return 0
  compgen -G "$CHECKPOINT_DIR/*" >/dev/null || return 0
  local repair=(--repair)
  [[ ${KEEP_LATEST:-0} == 1 ]] && repair=()
  RESUME_TAG=$(newest_checkpoint "${repair[@]}") ||
    die "$CHECKPOINT_DIR has no complete checkpoint to resume from; move it away to begin anew"
  local named=
  [[ -f $CHECKPOINT_DIR/latest ]] && named=$(<"$CHECKPOINT_DIR/latest")
  [[ -z $RESUME_TAG || $named == "$RESUME_TAG" || ${KEEP_LATEST:-0} != 1 ]] ||
    die "$CHECKPOINT_DIR/latest names '$named', which is not complete or not there (KEEP_LATEST=1); repair or remove it"
  [[ -n $RESUME_TAG || -z $named ]] || die "$CHECKPOINT_DIR/latest names '$named', which is not there; repair or remove it"
}

newest_checkpoint() { "${CONTAINER_PREFIX[@]}" ds_fp8 latest "$CHECKPOINT_DIR" "$@"; }
