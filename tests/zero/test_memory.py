"""Measured bytes are what the cost model says, and a step needs little beside what lies there anyway."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_memory.py"


@pytest.mark.dist
def test_the_step_of_zero_2_has_its_gradients_once():
    """One rank, O2 and O3: 8.1 and 9.1 bytes per parameter with gradients; the step adds well below the 2 bytes per
    parameter of a second copy of them: fp64 values of one of 24 layers for the norm, and one chunk.
    """
    arguments = [
        "--worlds",
        "1",
        "--stages",
        "2",
        "--levels",
        "O2",
        "O3",
        "--bases",
        "bf16",
        "--width",
        "512",
        "--depth",
        "24",
    ]
    done = subprocess.run([sys.executable, BENCHMARK, *arguments], capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in done.stdout.splitlines() if '"agrees"' in line]
    assert done.returncode == 0 and len(rows) == 2, done.stdout + done.stderr
    assert all(row["agrees"] and row["peak_extra"] < 1.0 for row in rows), rows
