#!/usr/bin/env bash
# Try releases of DeepSpeed, one environment each:   bash tests/matrix.sh [--write] [RELEASE ...]
#
#   bash tests/matrix.sh                      every release that ds_fp8/releases.py knows, then docs/compatibility.md
#   bash tests/matrix.sh 0.18.0 0.19.7        these two; the page is left alone unless --write is given
#
# Each environment ($MATRIX/RELEASE) lies over the one of the tests (.venv-test, or VENV) and holds the release alone, taken from
# the package index, and ds_fp8 with its import hook; so torch is installed once. A release takes about a minute of two quiet
# cores. Another Python or torch: make VENV with them, run this with READY=1, which takes VENV as it is, and a MATRIX of its own;
# then name that folder in ALSO when the page is written: its results join the page. Variables, all optional:
#   MATRIX    folder of the environments and results (.matrix)
#   ALSO      folders of earlier runs whose results belong on the page
#   LIMIT_S   ends a release that hangs (1200)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
VENV=${VENV:-.venv-test}
MATRIX=${MATRIX:-.matrix}
WRITE=
[ "${1:-}" = --write ] && { WRITE=1; shift; }
[ -n "${READY:-}" ] || bash .ci/venv.sh "$VENV" test || exit 1
[[ $VENV == /* ]] || VENV=$PWD/$VENV
[[ $MATRIX == /* ]] || MATRIX=$PWD/$MATRIX
# shellcheck disable=SC2046  # one word for each release
[ $# -gt 0 ] || { WRITE=1; set -- $("$VENV/bin/python" -c "from ds_fp8 import releases; print(*releases.RELEASED)"); }
mkdir -p "$MATRIX"
RESULTS=
for RELEASE in "$@"; do
  HOME_OF=$MATRIX/$RELEASE
  echo "{\"deepspeed\": \"$RELEASE\", \"features\": {}, \"error\": \"not installed\"}" > "$MATRIX/$RELEASE.json"
  RESULTS="$RESULTS $MATRIX/$RELEASE.json"
  if [ ! -f "$HOME_OF/ready" ]; then
    rm -rf "$HOME_OF"
    "$VENV/bin/python" -m venv --without-pip "$HOME_OF"
    SITE=$("$HOME_OF/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    BASE=$("$VENV/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    # Its own packages come first on the path, those of the tests' environment after them.
    echo "import site; site.addsitedir('$BASE')" > "$SITE/zz_base.pth"
    DS_BUILD_OPS=0 "$VENV/bin/python" -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --target "$SITE" \
      "deepspeed==$RELEASE" || continue
    touch "$HOME_OF/ready"
  fi
  TORCH_EXTENSIONS_DIR=$HOME_OF/torch_extensions timeout "${LIMIT_S:-1200}" "$HOME_OF/bin/python" tests/releases/run.py \
    > "$HOME_OF/out" 2> "$HOME_OF/err" || echo "== $RELEASE: failures, see $HOME_OF/err"
  tail -1 "$HOME_OF/out" > "$MATRIX/$RELEASE.json"
done
# shellcheck disable=SC2046,SC2086  # one word for each file
"$VENV/bin/python" tests/releases/table.py ${WRITE:+--write docs/compatibility.md} $RESULTS \
  $(for FOLDER in ${ALSO:-}; do ls "$FOLDER"/*.json; done)
