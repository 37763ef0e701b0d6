"""Measured bytes are what the cost model says, and a step needs little beside what lies there anyway."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import memory_jobs
import pytest
from ranks import run_ranks

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


@pytest.mark.dist
def test_before_the_first_step_o3_rests_where_o2_does():
    """Whoever chose O3 for memory meets no peak at the start: bytes per parameter of two ranks, all living tensors.

    Weights of 2 bytes, masters of .5 on each rank (stage 3: all of it cut in two, and a bucket of gradients); after the
    step O3 has its quantized values, in stages 1 and 2 in the place of the 16-bit weights.
    """
    for of_rank in run_ranks(2, memory_jobs.rests):
        for stage in (1, 2, 3):
            o2, o3 = of_rank[stage, "O2"], of_rank[stage, "O3"]
            for moment in ("made", "first gradients"):
                assert 2 < o3[moment] <= 1.05 * o2[moment], (stage, moment)
            most = o2["stepped"] + (0.5 if stage == 3 else 0)  # its half of the quantized values
            assert o2["made"] + 0.5 < o3["stepped"] <= 1.05 * most, stage


@pytest.mark.dist
def test_an_engine_that_was_destroyed_leaves_no_more_than_deepspeeds():
    """Engines of one process after the other: bytes per parameter that a second one adds for good."""
    cases = [(stage, level) for stage in (2, 3) for level in (None, "O3")]
    (found,) = run_ranks(1, memory_jobs.lefts, cases)
    for stage in (2, 3):
        theirs, ours = found[stage, None], found[stage, "O3"]
        assert ours["left"] <= theirs["left"] + 0.05, (stage, theirs, ours)
