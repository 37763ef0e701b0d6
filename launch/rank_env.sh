#!/usr/bin/env bash
# Runs on every rank: gives DeepSpeed the rank variables it reads (RANK, LOCAL_RANK, WORLD_SIZE), from whatever started it.
#
#   srun bash launch/rank_env.sh python train.py ...
#
# Knows Slurm, Open MPI, MPICH and Intel MPI (Hydra), Cray PALS and MVAPICH. MASTER_ADDR and MASTER_PORT come from outside.
# Makes this node's cache folders, the rank's log, and binds to a NUMA node where asked; see node_env.sh.
set -euo pipefail

first() { # value of the first variable that is set
  local name
  for name in "$@"; do [[ -n ${!name:-} ]] && { echo "${!name}"; return; }; done
  return 1
}

# An mpirun inside a Slurm job sees Slurm's variables of the batch step as well, so MPI's are asked first.
RANK=$(first OMPI_COMM_WORLD_RANK PALS_RANKID MV2_COMM_WORLD_RANK PMI_RANK SLURM_PROCID RANK) ||
  { echo "rank_env: no rank variable of Slurm, Open MPI, MPICH, PALS or MVAPICH is set" >&2; exit 2; }
WORLD_SIZE=$(first OMPI_COMM_WORLD_SIZE PALS_SIZE MV2_COMM_WORLD_SIZE PMI_SIZE SLURM_NTASKS WORLD_SIZE) ||
  { echo "rank_env: rank $RANK does not know how many ranks there are" >&2; exit 2; }
LOCAL_RANK=$(first OMPI_COMM_WORLD_LOCAL_RANK PALS_LOCAL_RANKID MV2_COMM_WORLD_LOCAL_RANK MPI_LOCALRANKID \
  SLURM_LOCALID LOCAL_RANK) ||
  { echo "rank_env: rank $RANK does not know its place on this node" >&2; exit 2; }
: "${MASTER_ADDR:?rank_env: set MASTER_ADDR}" "${MASTER_PORT:?rank_env: set MASTER_PORT}"
export RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT

# Node-local, so each node makes its own; private, because what lies there is run.
if [[ -n ${NODE_CACHE:-} ]]; then
  (umask 077 && mkdir -p "$NODE_CACHE")
  [[ -O $NODE_CACHE ]] || { echo "rank_env: $NODE_CACHE belongs to somebody else; set NODE_CACHE" >&2; exit 2; }
  touch "$NODE_CACHE"
  if [[ $LOCAL_RANK == 0 && ${CACHE_DAYS:-14} -gt 0 && $NODE_CACHE == */ds_fp8-*/* ]]; then # of versions that nobody uses now
    find "$(dirname "$NODE_CACHE")" -mindepth 1 -maxdepth 1 -user "$(id -u)" -mtime "+${CACHE_DAYS:-14}" -exec rm -rf {} + 2>/dev/null || true
  fi
fi
for folder in "${TRITON_CACHE_DIR:-}" "${TORCHINDUCTOR_CACHE_DIR:-}" "${TORCH_EXTENSIONS_DIR:-}"; do
  [[ -z $folder ]] || (umask 077 && mkdir -p "$folder")
done

BIND=()
if [[ ${NUMA_BIND:-0} == 1 ]]; then
  command -v numactl >/dev/null || { echo "rank_env: NUMA_BIND=1 needs numactl on $(hostname)" >&2; exit 2; }
  NODE=
  BUS=$(nvidia-smi --query-gpu=pci.bus_id --format=csv,noheader --id="$LOCAL_RANK" 2>/dev/null) || BUS=
  if [[ -n $BUS ]]; then # 00000000:1B:00.0, in /sys with four digits and small letters
    BUS=${BUS,,}
    NODE=$(cat "/sys/bus/pci/devices/${BUS: -12}/numa_node" 2>/dev/null) || NODE=
  fi
  NODES=(/sys/devices/system/node/node[0-9]*)
  [[ $NODE == [0-9]* ]] || NODE=$((LOCAL_RANK % ${#NODES[@]}))
  BIND=(numactl --cpunodebind="$NODE" --membind="$NODE")
fi

if [[ ${TELL_EXIT:-0} == 1 ]]; then # for a launcher that does not tell who failed; read by supervise.sh
  exec 3>&2
  if [[ -n ${LOG_DIR:-} && $RANK != 0 ]]; then mkdir -p "$LOG_DIR" && exec >>"$LOG_DIR/rank_$RANK.log" 2>&1; fi
  CHILD=
  for number in TERM USR1 INT; do
    # shellcheck disable=SC2064 # the signal of this turn
    trap "[[ -z \$CHILD ]] || kill -$number \$CHILD 2>/dev/null || true" "$number"
  done
  "${BIND[@]}" "$@" 3>&- &
  CHILD=$!
  while true; do
    CODE=0
    wait "$CHILD" || CODE=$?
    if ((CODE <= 128)) || ! kill -0 "$CHILD" 2>/dev/null; then break; fi
  done
  ((CODE == 0)) || echo "rank_env: rank $RANK ended with exit code $CODE" >&3
  exit "$CODE"
fi
if [[ -n ${LOG_DIR:-} && $RANK != 0 ]]; then
  mkdir -p "$LOG_DIR"
  exec "${BIND[@]}" "$@" >>"$LOG_DIR/rank_$RANK.log" 2>&1
fi
exec "${BIND[@]}" "$@"
