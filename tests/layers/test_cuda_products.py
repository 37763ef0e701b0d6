"""The GPU's fast path where no GPU is: see `interpreted_cuda_products.py`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_fast_path_in_the_interpreter():
    """In a process of its own, because Triton reads TRITON_INTERPRET when it is imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "PYTEST_"))}
    kept |= {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(HERE / "interpreted_cuda_products.py"),
    ]
    done = subprocess.run(command, cwd=HERE.parents[1], env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
