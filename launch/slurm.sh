#!/usr/bin/env bash
# Slurm: one task per GPU, started by srun.
#
#   DS_CONFIG=ds.json CHECKPOINT_DIR=ckpt launch/slurm.sh train.py --epochs 3        checks, then submits itself
#   DS_CONFIG=ds.json sbatch --nodes=8 launch/slurm.sh train.py --epochs 3           the same without the early check
#
# Assumes: ds_fp8 and DeepSpeed importable on the nodes (or CONTAINER_IMAGE), this folder on a shared file system, and a
# script that saves checkpoints by itself. Ends in time: 240 s before the limit the job is requeued, and goes on from
# the latest checkpoint. Variables: see preflight.sh, and
#   SBATCH_ARGS        more arguments for sbatch, e.g. "--nodes=8 --partition=h100 --time=24:00:00"
#   SRUN_ARGS          more arguments for srun
#   CONTAINER_IMAGE    image for srun --container-image (pyxis); CONTAINER_MOUNTS defaults to the current folder
#   FORWARD_SIGNAL     signal that the script wants before a requeue, e.g. USR1     (default: none is sent)
#   MAX_REQUEUES       give up after so many restarts                               (default: 50)
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

# In a job this file is a copy in Slurm's spool, so the folder of its neighbours is carried along.
export LAUNCH_DIR=${LAUNCH_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
[[ -f $LAUNCH_DIR/preflight.sh ]] || export LAUNCH_DIR=${SLURM_SUBMIT_DIR:-.}/launch
source "$LAUNCH_DIR/preflight.sh"

if [[ -z ${SLURM_JOB_ID:-} ]]; then # on the login node: check first, spend nodes afterwards
  build_command "$@"
  [[ -n ${CONTAINER_IMAGE:-} ]] || check_config
  read -ra SBATCH_EXTRA <<<"${SBATCH_ARGS:-}"
  exec sbatch --export=ALL "${SBATCH_EXTRA[@]}" "$LAUNCH_DIR/slurm.sh" "$@"
fi

requeue() {
  say "the time limit is near: requeueing job $SLURM_JOB_ID (restart ${SLURM_RESTART_COUNT:-0})"
  # Only the steps get this signal; the batch shell is already here.
  [[ -z ${FORWARD_SIGNAL:-} ]] || scancel --signal="$FORWARD_SIGNAL" "$SLURM_JOB_ID" || true
  if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-50})); then
    say "already restarted ${SLURM_RESTART_COUNT} times (MAX_REQUEUES): not again"
  else
    scontrol requeue "$SLURM_JOB_ID" || say "scontrol requeue failed; submit the job again by hand"
  fi
}
trap requeue USR1

STEP=()
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
  STEP=(--container-image="$CONTAINER_IMAGE" --container-mounts="${CONTAINER_MOUNTS:-$PWD:$PWD}" --container-workdir="$PWD")
  REACH=(srun --nodes=1 --ntasks=1 "${STEP[@]}")
else
  REACH=()
fi
check_config "${REACH[@]}"
build_command "$@"
check_machine "${REACH[@]}"
set_caches "$SLURM_JOB_ID"
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
set_rendezvous "$FIRST_NODE" "$SLURM_JOB_ID"
read -ra SRUN_EXTRA <<<"${SRUN_ARGS:-}"

run_until_done srun --kill-on-bad-exit=1 --export=ALL "${STEP[@]}" "${SRUN_EXTRA[@]}" bash "$LAUNCH_DIR/rank_env.sh" "${COMMAND[@]}"
