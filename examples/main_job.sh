#!/usr/bin/env bash
# The main job: from a fresh machine to two loss curves.   bash examples/main_job.sh
#
# Makes a virtual environment, installs torch, DeepSpeed and ds_fp8, trains the example GPT twice through the real
# `deepspeed` launcher (bf16, then FP8: the same script, another JSON), prints a table and draws both curves.
# Under 10 minutes on 2 cores, installation included. Variables, all optional:
#   VENV, OUT, STEPS, RANKS, PYTHON, TORCH_INDEX_URL (see .ci/venv.sh)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
OUT=${OUT:-runs/main_job}
STEPS=${STEPS:-150}

bash .ci/venv.sh "$VENV" example
export PATH="$PWD/$VENV/bin:$PATH"
[[ $VENV != /* ]] || export PATH="$VENV/bin:$PATH"
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
RANKS=${RANKS:-$([ "$GPUS" -ge 1 ] && [ "$GPUS" -lt 2 ] && echo 1 || echo 2)}
# One thread for each rank where two ranks share two cores; more cores, more threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / RANKS > 0 ? $(nproc) / RANKS : 1))}
# A cache of compiled extensions of its own: a shared one is rebuilt whenever torch differs.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/$OUT/torch_extensions}
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

rm -rf "$OUT/bf16" "$OUT/fp8"
for NAME in bf16 fp8; do
  echo "== $NAME: examples/ds_$NAME.json, $RANKS ranks, $STEPS steps"
  [ "$NAME" = bf16 ] || ds_fp8 check "examples/ds_$NAME.json"
  deepspeed --num_accelerators "$RANKS" --master_port "$(free_port)" examples/train_gpt.py \
    --deepspeed_config "examples/ds_$NAME.json" --out "$OUT/$NAME" --steps "$STEPS"
done

python examples/compare.py "$OUT/bf16" "$OUT/fp8" --plot "$OUT/loss.png"
