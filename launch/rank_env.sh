#!/usr/bin/env bash
# Runs on every rank: gives DeepSpeed the rank variables it reads (RANK, LOCAL_RANK, WORLD_SIZE), from whatever started it.
#
#   srun bash launch/rank_env.sh python train.py ...
#
# Knows Slurm, Open MPI, MPICH and Intel MPI (Hydra), Cray PALS and MVAPICH. MASTER_ADDR and MASTER_PORT come from outside.
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
for folder in "${TRITON_CACHE_DIR:-}" "${TORCHINDUCTOR_CACHE_DIR:-}" "${TORCH_EXTENSIONS_DIR:-}"; do
  [[ -z $folder ]] || mkdir -p "$folder" # node-local, so each node makes its own
done
exec "$@"
