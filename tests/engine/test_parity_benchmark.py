"""The parity benchmark, small: whole trainings through its own command, and what it takes over from an earlier
piece.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.dist, pytest.mark.slow]

COMMAND = [sys.executable, str(Path(__file__).parents[2] / "benchmarks/gpu/measure_parity.py"), "--tiny"]


def test_runs_train_adapt_and_are_not_run_again(tmp_path):
    """bf16 and O3 on two ranks, and fine-tuning of the bf16 run; a second piece resumes and runs what is missing
    only.
    """
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    options = ["--data", str(tmp_path / "data"), "--seconds", "150"]
    names = "pretrain/bf16/1@2;pretrain/O3/1@2"
    subprocess.run([*COMMAND, *options, "--out", str(first), "--only", names], check=True, timeout=170)
    runs = json.loads(first.read_text())
    before, after = (runs["pretrain/bf16/1"]["evals"][at][1] for at in (0, -1))
    assert after < before - 0.2
    assert runs["pretrain/O3/1"]["evals"][-1][1] == pytest.approx(after, abs=0.005)
    assert runs["pretrain/O3/1"]["ranks"] == 2
    operands = runs["pretrain/O3/1"]["operands"]
    assert len(operands) == 8 * 3 and all(lost < 0.1 for lost, *_ in operands.values())
    moved = runs["pretrain/O3/1"]["moved in the tail"]
    assert len(moved) == 3
    for name, distance in moved.items():  # masters of O3 take steps of 1e-6 as fp32 masters do
        assert distance == pytest.approx(runs["pretrain/bf16/1"]["moved in the tail"][name], rel=0.3)

    again = f"{names};pretrain/bf16/2;lora/delayed/1"
    command = [*COMMAND, *options, "--resume", str(first), "--out", str(second), "--only", again]
    said = subprocess.run(command, check=True, timeout=170, capture_output=True, text=True).stdout
    assert "pretrain/bf16/1:" not in said and "4 runs are done" in said
    adapted = json.loads(second.read_text())["lora/delayed/1"]
    assert adapted["evals"][-1][1] < adapted["evals"][0][1]
