#!/usr/bin/env bash
# Slurm: one task per GPU, started by srun.
#
#   DS_CONFIG=ds.json CHECKPOINT_DIR=ckpt launch/slurm.sh train.py --epochs 3        checks, then submits itself
#   DS_CONFIG=ds.json sbatch --nodes=8 launch/slurm.sh train.py --epochs 3           the same without the early check
#
# Assumes: ds_fp8 and DeepSpeed importable on the nodes (or CONTAINER_IMAGE), this folder on a shared file system. Ends in
# time: 240 s before the limit, and at a preemption, the ranks get USR1 and GRACE_S to save, then the job is requeued and
# goes on from the newest complete checkpoint. Variables: see preflight.sh, node_env.sh and supervise.sh, and
#   SBATCH_ARGS        more arguments for sbatch, e.g. "--nodes=8 --partition=h100 --time=24:00:00 --cpus-per-task=12"
#   SRUN_ARGS          more arguments for srun
#   CONTAINER_IMAGE    image for srun --container-image (pyxis); CONTAINER_MOUNTS defaults to the folders named here
#   MAX_REQUEUES       give up after so many restarts                               (default: 50)
#   CHECKPOINT_DIR     in an array job it holds %a, the task's number: each task has its own
# A cluster without GRES for GPUs wants --gpus-per-node=0 in SBATCH_ARGS; submitted by this script it is added.
#SBATCH --job-name=ds_fp8
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@240
set -euo pipefail

# In a job this file is a copy in Slurm's spool: where it came from, and its neighbours with it, Slurm knows.
export LAUNCH_DIR=${LAUNCH_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
if [[ ! -f $LAUNCH_DIR/preflight.sh && -n ${SLURM_JOB_ID:-} ]]; then
  LAUNCH_DIR=$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p' | awk 'NR == 1')")
  [[ -f $LAUNCH_DIR/preflight.sh ]] || LAUNCH_DIR=${SLURM_SUBMIT_DIR:-.}/launch
  [[ -f $LAUNCH_DIR/preflight.sh ]] || { echo "launch: where are my neighbours? set LAUNCH_DIR to the folder of slurm.sh" >&2; exit 2; }
fi
# shellcheck source=launch/preflight.sh
source "$LAUNCH_DIR/preflight.sh"

if [[ -z ${SLURM_JOB_ID:-} ]]; then # on the login node: check first, spend nodes afterwards
  (($# > 0)) || die "which script? usage: DS_CONFIG=ds.json $0 train.py [arguments]"
  [[ -n ${CONTAINER_IMAGE:-} ]] || check_config
  read -ra SBATCH_EXTRA <<<"${SBATCH_ARGS:-}"
  # A partition without GPUs refuses the header's --gpus-per-node.
  RESOURCES=$(sinfo -h -o %G 2>/dev/null) || RESOURCES=gpu
  [[ -z $RESOURCES || $RESOURCES == *gpu* || ${SBATCH_ARGS:-} == *--gpus* ]] || SBATCH_EXTRA=(--gpus-per-node=0 "${SBATCH_EXTRA[@]}")
  exec sbatch --export=ALL "${SBATCH_EXTRA[@]}" "$LAUNCH_DIR/slurm.sh" "$@"
fi

[[ ${SLURM_HET_SIZE:-1} == 1 ]] ||
  die "a heterogeneous job has $SLURM_HET_SIZE components and srun would start ranks in the first one only; submit one component"
if [[ -n ${SLURM_ARRAY_TASK_ID:-} && -n ${CHECKPOINT_DIR:-} ]]; then
  [[ $CHECKPOINT_DIR == *%a* ]] ||
    die "the tasks of this array share CHECKPOINT_DIR=$CHECKPOINT_DIR and would load each other's; write $CHECKPOINT_DIR/%a, and let the script read \$CHECKPOINT_DIR"
  export CHECKPOINT_DIR=${CHECKPOINT_DIR//%a/$SLURM_ARRAY_TASK_ID}
  RESUME_ARGS=${RESUME_ARGS//%a/$SLURM_ARRAY_TASK_ID}
fi

seconds() { # of Slurm's [days-]hours:minutes:seconds; nothing for UNLIMITED and the like
  local days=0 rest=$1 parts
  [[ $rest == *[0-9]* ]] || return 0
  [[ $rest != *-* ]] || { days=${rest%%-*} rest=${rest#*-}; }
  IFS=: read -ra parts <<<"$rest"
  while ((${#parts[@]} < 3)); do parts=(0 "${parts[@]}"); done
  echo $((10#$days * 86400 + 10#${parts[0]} * 3600 + 10#${parts[1]} * 60 + 10#${parts[2]}))
}
time_left() { seconds "$(squeue -h -j "$SLURM_JOB_ID" -o %L 2>/dev/null || true)"; }
LEFT=$(time_left) WARN_S=
# The warning would come at once, and the next start's too.
[[ -z $LEFT ]] || WARN_S=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.*[ =:]USR1@\([0-9]*\).*/\1/p' || true)
((${LEFT:-1000000} > ${WARN_S:-240} + 30)) ||
  die "the time limit leaves $LEFT s, the warning comes ${WARN_S:-240} s before its end: raise --time, or lower it with --signal=B:USR1@<seconds>"

tell_ranks() { scancel --signal="$1" "$SLURM_JOB_ID"; } # all steps; the batch shell is already here

# The ranks have left: again, from what they saved. Exit code 0: another start follows.
on_stop() {
  local state now
  state=$(squeue -h -j "$SLURM_JOB_ID" -o %T 2>/dev/null || true)
  if [[ $1 != USR1 && -n $state && $state != RUNNING ]]; then return 143; fi # somebody cancelled it: it stays so
  if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-50})); then
    say "already restarted ${SLURM_RESTART_COUNT} times (MAX_REQUEUES): not again"
    return 1
  fi
  now=$(newest_or_none)
  if [[ $1 == USR1 && -n ${CHECKPOINT_DIR:-} && $now == "$BEGAN_FROM" && -n ${LEFT:-} ]] && (($(time_left || echo 0) < ${WARN_S:-240} + 60)); then
    say "no checkpoint since this start within a whole time limit: not requeued, it would go on for ever"
    return 1
  fi
  say "requeueing job $SLURM_JOB_ID (restart ${SLURM_RESTART_COUNT:-0})"
  scontrol requeue "$SLURM_JOB_ID" || { say "scontrol requeue failed; submit the job again by hand"; return 1; }
  for _ in {1..60}; do # Slurm ends this shell; an exit before that would end the job
    [[ $(squeue -h -j "$SLURM_JOB_ID" -o %T 2>/dev/null || true) == RUNNING ]] || break
    nap 0.5
  done
}

STEP=()
REACH=()
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
  if [[ -z ${CONTAINER_MOUNTS:-} ]]; then
    CONTAINER_MOUNTS=
    while IFS= read -r folder; do CONTAINER_MOUNTS+=${CONTAINER_MOUNTS:+,}$folder:$folder; done < <(needed_folders)
  fi
  STEP=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS" --container-workdir="$PWD")
  REACH=(srun --nodes=1 --ntasks=1 "${STEP[@]}")
fi
check_config "${REACH[@]}"
build_command "$@"
BEGAN_FROM=$RESUME_TAG
TASKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-1}
CPUS_PER_RANK=${CPUS_PER_RANK:-${SLURM_CPUS_PER_TASK:-}}
set_logs "${SLURM_JOB_NAME:-ds_fp8}-$SLURM_JOB_ID"
set_node_env "$TASKS_PER_NODE"
set_caches
((${SLURM_JOB_NUM_NODES:-1} > 1)) || check_machine "${REACH[@]}"
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | first_line)
if [[ -z ${MASTER_ADDR:-} ]] && ! getent hosts "$FIRST_NODE" >/dev/null 2>&1; then # a name that only Slurm knows
  ADDRESS=$(scontrol show node "$FIRST_NODE" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | first_line)
  FIRST_NODE=${ADDRESS:-$FIRST_NODE}
fi
set_rendezvous "$FIRST_NODE" "$SLURM_JOB_ID"
# Since Slurm 22.05 srun does not take it from sbatch any more.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
read -ra SRUN_EXTRA <<<"${SRUN_ARGS:-}"
on_every_node() { srun --ntasks-per-node=1 --ntasks="${SLURM_JOB_NUM_NODES:-1}" "${STEP[@]}" "$@"; }
LINE=(srun --kill-on-bad-exit=1 --export=ALL "${STEP[@]}" "${SRUN_EXTRA[@]}" bash "$LAUNCH_DIR/rank_env.sh")
((${SLURM_JOB_NUM_NODES:-1} == 1)) || check_nodes "${LINE[@]}"

run_until_done "${LINE[@]}" "${COMMAND[@]}"
