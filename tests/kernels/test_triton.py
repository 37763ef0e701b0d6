"""Triton kernels on a machine without a GPU: interpreted against `numerics`, and compiled for Hopper."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "PYTEST_"))}
    kept |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=kept, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["interpreted_triton.py", "interpreted_triton_adam.py", "interpreted_triton_grouped.py"]
)
def test_interpreted_kernels_equal_the_reference(name):
    """Every kernel against its PyTorch reference, bit for bit, by Triton's interpreter on CPU tensors."""
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_kernels_compile_for_hopper(tmp_path):
    """The compiler is stricter than the interpreter, and needs no GPU: sm_90 code of every kernel, without fused
    multiply-add, which would round once where the CPU rounds twice."""
    done = run([str(HERE / "compile_triton.py")], TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
