"""The measurements for a GPU: each name has its script, and a run without a GPU says so instead of failing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"
BY_HAND = {"parity", "step_peak"}
"""Measurements with options of their own, which `run_all.py` does not start."""


def test_every_measurement_has_its_script():
    spec = importlib.util.spec_from_file_location("run_all", GPU / "run_all.py")
    assert spec and spec.loader
    run_all = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_all)
    assert {path.stem.removeprefix("measure_") for path in GPU.glob("measure_*.py")} == {
        *run_all.MEASUREMENTS,
        *BY_HAND,
    }


def test_a_measurement_runs_from_run_all(tmp_path):
    command = [
        sys.executable,
        str(GPU / "run_all.py"),
        "--measurements",
        "optimizer",
        "--budget",
        "90",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "results.json").read_text())["pieces"]["optimizer"]["state"] in ("done", "skipped")
