#!/usr/bin/env bash
# Open MPI, MPICH or Intel MPI: one rank per GPU, started by mpirun.
#
#   DS_CONFIG=ds.json HOSTFILE=hosts RANKS=16 RANKS_PER_NODE=8 launch/mpi.sh train.py --epochs 3
#
# Assumes: password-less ssh (or a scheduler that mpirun knows), the same paths on all nodes. MPI only starts the ranks:
# communication is DeepSpeed's (NCCL or gloo), so any MPI will do. Variables: see preflight.sh, and
#   HOSTFILE         hosts, one a line (Open MPI: "node1 slots=8", MPICH: "node1:8")   (default: none, this machine)
#   RANKS            ranks in all                                                     (default: RANKS_PER_NODE)
#   RANKS_PER_NODE   ranks on one node                                                (default: the GPUs here, else 1)
#   MPIRUN, MPI_ARGS the launcher, and more arguments for it                          (default: mpirun, none)
#   MPI_FLAVOR       openmpi or mpich                                                 (default: asked of MPIRUN)
set -euo pipefail
LAUNCH_DIR=${LAUNCH_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
source "$LAUNCH_DIR/preflight.sh"
: "${MPIRUN:=mpirun}"

check_config
build_command "$@"
check_machine
JOB=${PBS_JOBID:-${SLURM_JOB_ID:-$$}}
set_caches "${JOB//[^0-9]/}"
GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || GPUS=0
RANKS_PER_NODE=${RANKS_PER_NODE:-$((GPUS > 0 ? GPUS : 1))}
RANKS=${RANKS:-$RANKS_PER_NODE}
FIRST_HOST=$(hostname)
if [[ -n ${HOSTFILE:-} ]]; then
  FIRST_HOST=$(sed -e 's/#.*//' -e '/^[[:space:]]*$/d' -e 's/[[:space:]:].*//' "$HOSTFILE" | head -n 1)
  [[ -n $FIRST_HOST ]] || die "no host in $HOSTFILE"
fi
set_rendezvous "$FIRST_HOST" "$JOB"

if [[ -z ${MPI_FLAVOR:-} ]]; then
  case $("$MPIRUN" --version 2>&1) in
    *"Open MPI"* | *OpenRTE* | *PRRTE*) MPI_FLAVOR=openmpi ;;
    *) MPI_FLAVOR=mpich ;;
  esac
fi
CARRIED=(MASTER_ADDR MASTER_PORT NODE_CACHE TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR TORCH_EXTENSIONS_DIR PATH PYTHONPATH
  LD_LIBRARY_PATH OMP_NUM_THREADS NCCL_DEBUG NCCL_SOCKET_IFNAME)
if [[ $MPI_FLAVOR == openmpi ]]; then
  # One rank per core would be bound to that core; a rank has data loaders and a communication thread.
  WHERE=(-np "$RANKS" --map-by "ppr:$RANKS_PER_NODE:node" --bind-to none ${HOSTFILE:+--hostfile "$HOSTFILE"})
  for name in "${CARRIED[@]}"; do [[ -z ${!name+set} ]] || WHERE+=(-x "$name"); done
else
  WHERE=(-n "$RANKS" -ppn "$RANKS_PER_NODE" ${HOSTFILE:+-f "$HOSTFILE"} -genvlist "$(IFS=,; echo "${CARRIED[*]}")")
fi
read -ra MPI_EXTRA <<<"${MPI_ARGS:-}"

run_until_done "$MPIRUN" "${WHERE[@]}" "${MPI_EXTRA[@]}" bash "$LAUNCH_DIR/rank_env.sh" "${COMMAND[@]}"
