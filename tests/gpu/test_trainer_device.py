"""The Trainer on a GPU with what its own arguments turn on beside FP8: Liger Kernel, and CUDA graphs. A user's script,
in bf16 and in FP8 by JSON alone.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.journeys import clients

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate")

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parent / "natural_trainer.py"
LAYERS = 14
CONFIG = clients.AUTO | {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("way", ["liger", "graphs"])
def test_what_the_trainer_turns_on_beside_fp8(way, tmp_path):
    if way == "liger" and importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger_kernel is not installed")
    clients.write(tmp_path, bf16=CONFIG, fp8=CONFIG | clients.FP8)
    bf16, fp8 = runs(tmp_path, way, ["bf16", "fp8"])
    assert "ds_fp8:" not in bf16.said and bf16.words("FP8 LAYERS") == ["0"]
    assert fp8.words("FP8 LAYERS") == [str(LAYERS)]
    assert f"all {LAYERS} planned layers ran in FP8 in step 1" in fp8.first_step, fp8.said
    assert fp8.losses != bf16.losses and fp8.losses == pytest.approx(bf16.losses, rel=0.03)
    assert fp8.losses[-1] < fp8.losses[0] - 0.1
    if way == "liger":  # norms, MLPs, and the loss fused with the head
        assert fp8.words("LIGER") == bf16.words("LIGER") and int(fp8.words("LIGER")[0]) > 2
    else:
        assert "skipping cudagraphs" not in fp8.said
        replays = int(fp8.words("REPLAYS")[0])
        assert replays and replays == int(bf16.words("REPLAYS")[0]), "as many replays as without FP8"


def runs(folder: Path, way: str, names: list[str]) -> list[clients.Run]:
    """The script once for each JSON file, side by side."""
    started = []
    for name in names:
        environment = os.environ | clients.variables(folder)
        environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
        command = [sys.executable, str(SCRIPT), way, f"{name}.json"]
        started.append(
            subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    found = []
    for process in started:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said[-6000:]
        found.append(clients.Run(said))
    return found
