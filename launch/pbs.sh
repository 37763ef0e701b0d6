#!/usr/bin/env bash
# PBS Pro / OpenPBS: one rank per GPU by mpirun over $PBS_NODEFILE.
#
#   qsub -v DS_CONFIG=ds.json,CHECKPOINT_DIR=ckpt,TRAIN="train.py --epochs 3" -l select=4:ncpus=64:ngpus=8:mpiprocs=8 launch/pbs.sh
#
# Assumes what mpi.sh assumes. PBS warns no job before its limit, so a timer does: WALLTIME_S minus 240 s after the start
# a successor is queued that waits for this job and goes on from the latest checkpoint. Variables: see preflight.sh and
# mpi.sh, and
#   TRAIN         script and arguments, since qsub passes none        (default: the arguments of this script)
#   WALLTIME_S    this job's limit in seconds                         (default: 43200, as below; 0: no successor)
#   WARN_S        how long before the limit                           (default: 240)
#   LAUNCH_DIR    this folder, since PBS runs a copy                  (default: $PBS_O_WORKDIR/launch)
#PBS -N ds_fp8
#PBS -l select=1:ncpus=64:ngpus=8:mpiprocs=8
#PBS -l place=scatter:excl
#PBS -l walltime=12:00:00
#PBS -j oe
#PBS -r y
set -euo pipefail
cd "${PBS_O_WORKDIR:-.}"
export LAUNCH_DIR=${LAUNCH_DIR:-$PWD/launch}
export HOSTFILE=${HOSTFILE:-${PBS_NODEFILE:?pbs: run me by qsub}}
read -ra SCRIPT <<<"${TRAIN:-$*}"

# A node stands in the file once for each of its ranks.
export RANKS=${RANKS:-$(wc -l <"$HOSTFILE")}
export RANKS_PER_NODE=${RANKS_PER_NODE:-$((RANKS / $(sort -u "$HOSTFILE" | wc -l)))}
UNIQUE=$(mktemp)
sort -u "$HOSTFILE" >"$UNIQUE"
# The same host stays first as in PBS's file: it is where this script runs.
{ head -n 1 "$HOSTFILE"; grep -vxF "$(head -n 1 "$HOSTFILE")" "$UNIQUE" || true; } >"$UNIQUE.ordered"
export HOSTFILE=$UNIQUE.ordered

succeed() {
  echo "launch: the time limit is near: queueing a successor of $PBS_JOBID" >&2
  export TRAIN="${SCRIPT[*]}"
  unset HOSTFILE RANKS RANKS_PER_NODE MASTER_ADDR MASTER_PORT
  qsub -V -W depend=afterany:"$PBS_JOBID" "$LAUNCH_DIR/pbs.sh"
}
trap succeed USR1
TIMER_PID=
if ((${WALLTIME_S:=43200} > 0)); then
  (sleep $((WALLTIME_S - ${WARN_S:-240})) && kill -USR1 $$) &
  TIMER_PID=$!
fi
trap '[[ -z $TIMER_PID ]] || kill "$TIMER_PID" 2>/dev/null || true; rm -f "$UNIQUE" "$UNIQUE.ordered"' EXIT

source "$LAUNCH_DIR/mpi.sh" "${SCRIPT[@]}"
