#!/usr/bin/env bash
# Set up and run the tests:   bash tests/run.sh [pytest arguments]      e.g. bash tests/run.sh -m "not dist"
#
# Makes its own virtual environment (.venv-test) unless VENV names one; installs ds_fp8 with its activation hook, so that the tests
# meet what a user meets. Tests that start several processes run beside others: one thread for each process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv-test}

bash .ci/venv.sh "$VENV" test,dev
[[ $VENV == /* ]] || VENV=$PWD/$VENV
export PATH="$VENV/bin:$PATH"
export OMP_NUM_THREADS=1
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$VENV/torch_extensions}
exec python -m pytest -n "${WORKERS:-2}" --dist worksteal -q "$@"
