"""The main job in small: the example's own script and JSON, two ranks, resume, and the table."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.journeys.launching import PACKAGE_PARENT, ROOT, command_of, free_port, hook_folder, launch

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SMALL = ("--width", "64", "--depth", "1", "--context", "32", "--eval-windows", "8", "--eval-every", "2")


def train(folder, config: str, name: str, steps: int, *more: str) -> str:
    command = [command_of("deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    script = ["examples/train_gpt.py", "--deepspeed_config", config, "--out", f"runs/{name}", "--steps", str(steps)]
    path = f"{hook_folder(folder / 'import_hook')}:{PACKAGE_PARENT}"
    code, said = launch([*command, *script, *SMALL, *more], folder, PYTHONPATH=path)
    assert code == 0, said
    return said


def test_the_example_trains_resumes_and_is_compared(tmp_path):
    """Four FP8 steps at once, and two plus two with a checkpoint between: the same curve to the last digit."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    said = train(tmp_path, "examples/ds_fp8.json", "whole", 4)
    assert "4 of 5 Linear -> Fp8Linear" in said and "3 of 3 LayerNorm" in said
    train(tmp_path, "examples/ds_fp8.json", "parts", 2, "--save-every", "2")
    train(tmp_path, "examples/ds_fp8.json", "parts", 4)
    whole, parts = (json.loads((tmp_path / f"runs/{name}/metrics.json").read_text()) for name in ("whole", "parts"))
    assert whole["curve"] == parts["curve"] and len(whole["curve"]["train"]) == 4

    command = [
        command_of("python") or "python",
        "examples/compare.py",
        "runs/parts",
        "runs/whole",
        "--plot",
        "loss.png",
    ]
    code, table = launch(command, tmp_path)
    assert code == 0, table
    assert "4 of 5 Linear" in table and "eval loss" in table
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
