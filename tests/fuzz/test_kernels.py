"""Random kernel operations: on every path of this machine, and in a build with sanitizers (address, undefined
behaviour).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernel_cases
import pytest
from budget import seeds

from ds_fp8.kernels.cpu import build, loader

pytestmark = [pytest.mark.timeout(0)]
HERE = Path(__file__).resolve().parent
# -O0: with -O1 the compiler needs minutes for the instrumented step of Adam.
SANITIZERS = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


@pytest.mark.parametrize("path", ["portable", "avx2", "avx512"])
def test_every_path_gives_the_bytes_of_the_reference(path):
    before = loader.path()
    try:
        if loader.choose(path) != path:
            pytest.skip(f"this CPU has no {path}")
        for seed in seeds(3.0):
            kernel_cases.check(seed)
    finally:
        loader.choose(before) if before != "torch" else None


@pytest.mark.slow
def test_no_address_and_no_overflow_is_wrong(tmp_path):
    """ASan and UBSan over the portable path, the one that is unmodified C++; the first finding ends the process."""
    library = build.build(tmp_path, flags=SANITIZERS, portable_only=True)
    runtime = subprocess.run(
        [build.find_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler brings no libasan.so")
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "DS_FP8_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "kernel_cases.py"), str(library), "8"],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
    assert "cases" in done.stdout
