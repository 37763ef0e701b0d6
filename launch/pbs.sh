#!/usr/bin/env bash
# PBS Pro / OpenPBS: one rank per GPU by mpirun over $PBS_NODEFILE.
#
#   qsub -v DS_CONFIG=ds.json,CHECKPOINT_DIR=ckpt,TRAIN="train.py --epochs 3" -l select=4:ncpus=64:ngpus=8:mpiprocs=8 launch/pbs.sh
#
# Assumes what mpi.sh assumes. PBS warns no job before its limit, so a timer does: WARN_S before the end of WALLTIME_S the
# ranks get USR1 and GRACE_S to save, then a successor is queued, with this job's resources, queue and account; it waits
# for this job and goes on from the newest complete checkpoint. Variables: see preflight.sh and mpi.sh, and
#   TRAIN         script and arguments, since qsub passes none        (default: the arguments of this script)
#   WALLTIME_S    this job's limit in seconds; 0: no successor        (default: what PBS says, else 43200, as below)
#   WARN_S        how long before the limit                           (default: 240)
#   MAX_REQUEUES  successors in a row                                 (default: 50)
#   PASS_ON       more variables for the successor, beside those of the launch scripts and node_env.sh
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
[[ -f $LAUNCH_DIR/mpi.sh ]] || { echo "launch: where are my neighbours? set LAUNCH_DIR to the folder of pbs.sh" >&2; exit 2; }
[[ -n ${PBS_NODEFILE:-} && -n ${PBS_JOBID:-} ]] || { echo "launch: run me by qsub" >&2; exit 2; }
# What the user gave, before anything else is set: the successor gets this and no more.
HANDED_ON=()
for name in DS_CONFIG CONFIG_FLAG PYTHON CONTAINER CHECKPOINT_DIR RESUME_ARGS KEEP_LATEST DOCTOR_ARGS DOCTOR_S SKIP_CHECK CARRY \
  NODE_CACHE CACHE_DAYS LOG_DIR CPUS_PER_RANK NUMA_BIND FABRIC DEBUG_HANGS FORWARD_SIGNAL GRACE_S RETRIES HANG_S DCGM_PAUSE MPIRUN \
  MPI_ARGS MPI_FLAVOR WALLTIME_S WARN_S MAX_REQUEUES PASS_ON LAUNCH_DIR RANKS RANKS_PER_NODE PATH PYTHONPATH LD_LIBRARY_PATH \
  VIRTUAL_ENV ${PASS_ON:-}; do
  [[ -z ${!name+set} ]] || HANDED_ON+=("$name")
done
while IFS= read -r name; do
  [[ $name != DS_CONFIG && $name != DS_ENV_FILE ]] || continue
  case $name in NCCL_* | GLOO_* | FI_* | UCX_* | HF_* | WANDB_* | OMP_* | DS_*) HANDED_ON+=("$name") ;; esac
done < <(compgen -e)
ASKED_RANKS=${RANKS:-} ASKED_PER_NODE=${RANKS_PER_NODE:-}
HOSTFILE=${HOSTFILE:-$PBS_NODEFILE}
read -ra SCRIPT <<<"${TRAIN:-$*}"

# A node stands in the file once for each of its ranks.
export RANKS=${RANKS:-$(wc -l <"$HOSTFILE")}
export RANKS_PER_NODE=${RANKS_PER_NODE:-$((RANKS / $(sort -u "$HOSTFILE" | wc -l)))}
UNIQUE=$(mktemp)
trap 'rm -f "$UNIQUE"' EXIT
awk '!seen[$0]++' "$HOSTFILE" >"$UNIQUE" # the first host stays first: it is where this script runs
export HOSTFILE=$UNIQUE

of_job() { qstat -f -w "$PBS_JOBID" 2>/dev/null | sed -n "s/^ *$1 = //p" | awk 'NR == 1'; }
if [[ -z ${WALLTIME_S:-} ]]; then
  WALLTIME_S=$(of_job Resource_List.walltime | awk -F: 'NF == 3 { print $1 * 3600 + $2 * 60 + $3 }') || WALLTIME_S=
  : "${WALLTIME_S:=43200}"
fi
: "${WARN_S:=240}"
((WALLTIME_S == 0 || WALLTIME_S > WARN_S)) ||
  { echo "launch: WALLTIME_S=$WALLTIME_S is not longer than the warning before its end, WARN_S=$WARN_S: a longer limit, or a smaller WARN_S" >&2; exit 2; }

# The ranks have saved and left. Only a warning asks for a successor; a qdel does not.
on_stop() {
  local now value ask=()
  [[ $1 == USR1 ]] || return 143
  ((${RESTART_COUNT:-0} < ${MAX_REQUEUES:-50})) || { say "already ${RESTART_COUNT} successors (MAX_REQUEUES): not again"; return 1; }
  now=$(newest_or_none)
  [[ -z ${CHECKPOINT_DIR:-} || $now != "$RESUME_TAG" ]] ||
    { say "no checkpoint since this start within a whole time limit: no successor, it would go on for ever"; return 1; }
  for value in select place walltime; do
    [[ -z $(of_job "Resource_List.$value") ]] || ask+=(-l "$value=$(of_job "Resource_List.$value")")
  done
  [[ -z $(of_job queue) ]] || ask+=(-q "$(of_job queue)")
  value=$(of_job Account_Name)
  [[ -z $value ]] || ask+=(-A "$value")
  value=$(of_job project)
  [[ -z $value || $value == _pbs_project_default ]] || ask+=(-P "$value")
  value=$(of_job Job_Name)
  [[ -z $value ]] || ask+=(-N "$value")
  export TRAIN="${SCRIPT[*]}" RESTART_COUNT=$((${RESTART_COUNT:-0} + 1))
  export RANKS=$ASKED_RANKS RANKS_PER_NODE=$ASKED_PER_NODE
  say "the time limit is near: queueing a successor of $PBS_JOBID"
  qsub -v "$(IFS=,; echo "${HANDED_ON[*]},TRAIN,RESTART_COUNT")" "${ask[@]}" -W depend=afterany:"$PBS_JOBID" "$LAUNCH_DIR/pbs.sh"
}

trap 'STOPPING=USR1' USR1 # until supervise.sh takes over
if ((WALLTIME_S > 0)); then
  # Holds nobody's output, and goes with this shell.
  (sleep "$((WALLTIME_S - WARN_S))" & trap 'kill $!' TERM; wait $! && kill -USR1 $$) </dev/null >/dev/null 2>&1 &
  TIMER_PID=$!
  trap 'rm -f "$UNIQUE"; kill "$TIMER_PID" 2>/dev/null || true' EXIT
fi

# shellcheck source=launch/mpi.sh
source "$LAUNCH_DIR/mpi.sh" "${SCRIPT[@]}"
