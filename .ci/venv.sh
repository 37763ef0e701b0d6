#!/usr/bin/env bash
# Make a virtual environment with ds_fp8 in it:   bash .ci/venv.sh FOLDER [EXTRAS]      e.g. .venv test,dev
#
# Assumes Python 3.10 or newer and pip's usual access to a package index. Variables, all optional:
#   PYTHON            the Python to use (default: the first of python3, python3.11 ... that is new enough)
#   TORCH_INDEX_URL   index to take torch from, e.g. PyTorch's own index of CPU builds
#   EDITABLE=1        install the checkout itself instead of a copy
#   LOCKED=1          every package but torch by .ci/lock.txt, with its SHA-256 (CPython 3.11, Linux x86_64; EXTRAS test,dev)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${1:?usage: bash .ci/venv.sh FOLDER [EXTRAS]}
EXTRAS=${2:-example}

say() { echo "[venv ${SECONDS}s] $*"; }

new_enough() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
if [ -z "${PYTHON:-}" ]; then
  for candidate in python3 python3.11 python3.12 python3.13 python3.10; do
    if new_enough "$candidate"; then PYTHON=$candidate; break; fi
  done
fi
[ -n "${PYTHON:-}" ] || {
  echo "no Python >= 3.10 that can make a virtual environment; set PYTHON (Debian, Ubuntu: apt install python3-venv)" >&2
  exit 1
}

say "$("$PYTHON" --version) -> $VENV"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
PIP=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)

# torch first and alone: whatever comes later finds it there, and nothing pulls in another build of it.
"${PIP[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep '^torch==' constraints.txt)"
say "$("$VENV/bin/python" -W ignore -c 'import torch; print("torch", torch.__version__)')"

DEPS=()
if [ "${LOCKED:-0}" = 1 ]; then
  "$VENV/bin/python" -c 'import platform, sys; sys.exit((sys.version_info[:2], platform.machine(), sys.platform) != ((3, 11), "x86_64", "linux"))' || {
    echo ".ci/lock.txt is for CPython 3.11 on Linux x86_64; .ci/lock.py writes another" >&2
    exit 2
  }
  # What others are built with comes first, and what is built from source last: with no isolation nothing unlisted is fetched.
  locked() { "${PIP[@]}" --no-deps --no-build-isolation --require-hashes -r <(grep -E "$@" .ci/lock.txt); }
  locked '^(setuptools|wheel)=='
  locked -v '^(setuptools|wheel|deepspeed)==|^#'
  locked '^deepspeed=='
  DEPS=(--no-deps)
else
  "${PIP[@]}" -c constraints.txt setuptools wheel
  "${PIP[@]}" -c constraints.txt "$(grep '^deepspeed==' constraints.txt)"
fi
say "deepspeed installed"

# Without build isolation: the build needs only setuptools, which is there. What an earlier run installed goes first:
# its version may be the same and its files not. One install, because each one compiles the kernels.
"$VENV/bin/python" -m pip --quiet --disable-pip-version-check uninstall --yes ds-fp8 2>/dev/null || true
"${PIP[@]}" -c constraints.txt "${DEPS[@]}" --no-build-isolation ${EDITABLE:+-e} ".[$EXTRAS]"
say "ds_fp8 installed: $("$VENV/bin/python" -c 'import ds_fp8; print(ds_fp8.__version__, ds_fp8.__file__)')"
