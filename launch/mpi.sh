#!/usr/bin/env bash
# Open MPI, MPICH or Intel MPI: one rank per GPU, started by mpirun.
#
#   DS_CONFIG=ds.json HOSTFILE=hosts RANKS=16 RANKS_PER_NODE=8 launch/mpi.sh train.py --epochs 3
#
# Assumes: password-less ssh (or a scheduler that mpirun knows), the same paths on all nodes. MPI only starts the ranks:
# communication is DeepSpeed's (NCCL or gloo), so any MPI will do. Variables: see preflight.sh, node_env.sh and
# supervise.sh, and
#   HOSTFILE         hosts, one a line (Open MPI: "node1 slots=8", MPICH: "node1:8")   (default: none, this machine)
#   RANKS            ranks in all                                                     (default: RANKS_PER_NODE)
#   RANKS_PER_NODE   ranks on one node                                                (default: the GPUs here, else 1)
#   MPIRUN, MPI_ARGS the launcher, and more arguments for it                          (default: mpirun, none)
#   MPI_FLAVOR       openmpi or mpich                                                 (default: asked of MPIRUN)
set -euo pipefail
LAUNCH_DIR=${LAUNCH_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
# shellcheck source=launch/preflight.sh
source "$LAUNCH_DIR/preflight.sh"
: "${MPIRUN:=mpirun}"

check_config
build_command "$@"
JOB=${PBS_JOBID:-${SLURM_JOB_ID:-$$}}
JOB=${JOB//[^0-9]/}
GPUS=$(count_gpus)
RANKS_PER_NODE=${RANKS_PER_NODE:-$((GPUS > 0 ? GPUS : 1))}
RANKS=${RANKS:-$RANKS_PER_NODE}
set_logs "${PBS_JOBNAME:-mpi}-$JOB"
set_node_env "$RANKS_PER_NODE"
set_caches
FIRST_HOST=$(hostname)
if [[ -n ${HOSTFILE:-} ]]; then
  [[ -r $HOSTFILE ]] || die "cannot read HOSTFILE=$HOSTFILE"
  FIRST_HOST=$(sed -e 's/#.*//' -e '/^[[:space:]]*$/d' -e 's/[[:space:]:].*//' "$HOSTFILE" | first_line)
  [[ -n $FIRST_HOST ]] || die "no host in $HOSTFILE"
fi
set_rendezvous "$FIRST_HOST" "$JOB"

if [[ -z ${MPI_FLAVOR:-} ]]; then
  case $("$MPIRUN" --version 2>&1) in
    *"Open MPI"* | *OpenRTE* | *PRRTE*) MPI_FLAVOR=openmpi ;;
    *) MPI_FLAVOR=mpich ;;
  esac
fi
# Hydra waits for all processes when one that is no MPI program has failed: the rank tells it, and this script ends the rest.
if [[ $MPI_FLAVOR != openmpi ]]; then export TELL_EXIT=1; fi
set_carried
if [[ $MPI_FLAVOR == openmpi ]]; then
  # One rank per core would be bound to that core; a rank has data loaders and a communication thread.
  WHERE=(-np "$RANKS" --map-by "ppr:$RANKS_PER_NODE:node" --bind-to none ${HOSTFILE:+--hostfile "$HOSTFILE"})
  for name in "${CARRIED[@]}"; do WHERE+=(-x "$name"); done
else
  WHERE=(-n "$RANKS" -ppn "$RANKS_PER_NODE" ${HOSTFILE:+-f "$HOSTFILE"} -genvlist "$(IFS=,; echo "${CARRIED[*]}")")
fi
read -ra MPI_EXTRA <<<"${MPI_ARGS:-}"
LINE=("$MPIRUN" "${WHERE[@]}" "${MPI_EXTRA[@]}" bash "$LAUNCH_DIR/rank_env.sh")
# Open MPI passes USR1 on to every rank. Hydra does not: one rank that hears it tells the others (checkpoint_on_signal).
tell_ranks() {
  if [[ $MPI_FLAVOR == openmpi && $1 == USR* ]]; then kill "-$1" "$LAUNCHER_PID"; return; fi
  signal_local_ranks "$1" || { say "no rank on this machine to tell: the launcher ends them"; kill -TERM "$LAUNCHER_PID"; }
}
if ((RANKS > RANKS_PER_NODE)); then check_nodes "${LINE[@]}"; else check_machine; fi

run_until_done "${LINE[@]}" "${COMMAND[@]}"
