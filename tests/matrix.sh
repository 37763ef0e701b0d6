#!/usr/bin/env bash
# Try releases of DeepSpeed, one environment each:   bash tests/matrix.sh [--write] [RELEASE ...]
#
#   bash tests/matrix.sh                      every release that ds_fp8/releases.py knows, then docs/compatibility.md
#   bash tests/matrix.sh 0.18.0 0.19.7        these two; the page is left alone unless --write is given
#
# Each environment (.matrix/RELEASE) lies over the one of the tests (.venv-test, or VENV) and holds the release alone, taken from
# the package index, and ds_fp8 with its import hook; so torch is installed once. A release takes about a minute of two quiet
# cores. PYTHON, TORCH and what else differs: make VENV with them, then run this with READY=1, which takes VENV as it is. LIMIT_S
# (1200) ends a release that hangs.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv-test}
WRITE=
[ "${1:-}" = --write ] && { WRITE=1; shift; }
[ -n "${READY:-}" ] || bash .ci/venv.sh "$VENV" test || exit 1
[[ $VENV == /* ]] || VENV=$PWD/$VENV
[ $# -gt 0 ] || { WRITE=1; set -- $("$VENV/bin/python" -c "from ds_fp8 import releases; print(*releases.RELEASED)"); }
mkdir -p .matrix
RESULTS=
FAILED=0
for RELEASE in "$@"; do
  HOME_OF=$PWD/.matrix/$RELEASE
  if [ ! -f "$HOME_OF/ready" ]; then
    rm -rf "$HOME_OF"
    "$VENV/bin/python" -m venv --without-pip "$HOME_OF"
    SITE=$("$HOME_OF/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    BASE=$("$VENV/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    # Its own packages come first on the path, those of the tests' environment after them.
    echo "import site; site.addsitedir('$BASE')" > "$SITE/zz_base.pth"
    DS_BUILD_OPS=0 "$VENV/bin/pip" install -q --disable-pip-version-check --no-deps --no-build-isolation --target "$SITE" \
      "deepspeed==$RELEASE" && touch "$HOME_OF/ready" || { echo "== $RELEASE: not installed"; FAILED=1; continue; }
  fi
  echo "== $RELEASE"
  TORCH_EXTENSIONS_DIR=$HOME_OF/torch_extensions timeout "${LIMIT_S:-1200}" "$HOME_OF/bin/python" tests/releases/run.py \
    > "$HOME_OF/out" 2> "$HOME_OF/err" || { FAILED=1; echo "== $RELEASE: failures, see $HOME_OF/err"; }
  tail -1 "$HOME_OF/out" > "$HOME_OF/result.json"
  RESULTS="$RESULTS $HOME_OF/result.json"
done
# shellcheck disable=SC2086  # one word for each file
"$VENV/bin/python" tests/releases/table.py ${WRITE:+--write docs/compatibility.md} $RESULTS || FAILED=1
exit "$FAILED"
