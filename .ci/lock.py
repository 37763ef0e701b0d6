"""Write .ci/lock.txt: every package of a CI run with its version and the SHA-256 of the file that pip takes.

    python .ci/lock.py            with a pip that reaches an index; for CPython 3.11 on Linux x86_64, where CI runs

pip resolves the extras `test` and `dev` under constraints.txt and reports what it would install, without installing it.
torch is left out, and what only its CUDA builds need: which build of it is right depends on the machine
(`TORCH_INDEX_URL` of venv.sh), and each has another hash; its version is pinned in constraints.txt. The file names
packages, versions and hashes; no index.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / ".ci" / "lock.txt"
LEFT_OUT = ("torch", "nvidia-", "cuda-", "ds-fp8", "ds_fp8")
HEAD = """# Packages of a CI run (CPython 3.11, Linux x86_64), written by .ci/lock.py.
# pip install --no-deps --require-hashes -r .ci/lock.txt
# torch is not here: its build is the machine's (see .ci/venv.sh).
"""


def resolve() -> list[dict[str, Any]]:
    """What pip would install, as its report has it."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-build-isolation"]
    command += ["--quiet", "--report", "-", "-c", "constraints.txt", ".[test,dev]", "setuptools", "wheel"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return list(json.loads(done.stdout)["install"])


def lock(installs: list[dict[str, Any]]) -> str:
    """Lines `name==version --hash=sha256:...`, by name."""
    lines = {}
    for one in installs:
        name, version = one["metadata"]["name"].lower().replace("_", "-"), one["metadata"]["version"]
        if name.startswith(LEFT_OUT) and name not in ("torchmetrics", "torchao"):
            continue
        digest = one["download_info"]["archive_info"]["hashes"]["sha256"]
        lines[name] = f"{name}=={version} --hash=sha256:{digest}"
    return HEAD + "\n".join(lines[name] for name in sorted(lines)) + "\n"


if __name__ == "__main__":
    TARGET.write_text(lock(resolve()), encoding="utf-8")
    print(f"{TARGET}: {len(TARGET.read_text().splitlines()) - len(HEAD.splitlines())} packages")
