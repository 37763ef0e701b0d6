"""The ready files of `configs/`: each passes `check`, each is taken by the real DeepSpeed, each does what its name
says.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_fp8 import config

FOLDER = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.json"))
LEVELS = {"msamp_o1": "O1", "msamp_o2": "O2", "msamp_o3": "O3", "msamp_o3_smallest": "O3", "accelerate_msamp": "O2"}
MS_AMP = {
    "ms_amp_plain": (0, None),
    "ms_amp_o2": (0, "O2"),
    "ms_amp_zero_o3": (2, "O3"),
    "ms_amp_zero_o3_te": (2, "O3"),
}


def test_the_folder_is_complete():
    names = {file.stem for file in FILES}
    assert names == {f"fp8_zero{stage}" for stage in range(4)} | LEVELS.keys() | MS_AMP.keys()
    readme = (FOLDER / "README.md").read_text()
    assert all(file.name in readme for file in FILES if not file.stem.startswith("fp8_zero"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_errors(file):
    """Strict JSON, so that every tool reads it, and nothing to complain but the key that MS-AMP's users bring along."""
    json.loads(file.read_text())
    problems = [str(problem) for problem in config.check(file)]
    expected = "zero_optimization/cpu_offload: deprecated in DeepSpeed; use offload_optimizer instead"
    assert problems == ([expected] if file.stem.startswith("ms_amp") else [])


@pytest.mark.parametrize("stage", range(4))
def test_fp8_presets(stage):
    settings = config.load(FOLDER / f"fp8_zero{stage}.json")
    assert (settings.fp8.enabled, settings.msamp.enabled) == (True, False)
    assert (settings.deepspeed.zero_stage, settings.deepspeed.base_dtype) == (stage, "bf16")


@pytest.mark.parametrize(("name", "level"), LEVELS.items())
def test_level_presets(name, level):
    settings = config.load(FOLDER / f"{name}.json")
    assert settings.fp8.enabled
    assert settings.msamp.level.name == level
    assert settings.deepspeed.base_dtype == "bf16"


@pytest.mark.parametrize(("name", "expected"), MS_AMP.items())
def test_ms_amps_own_examples(name, expected):
    stage, level = expected
    settings = config.load(FOLDER / f"{name}.json")
    assert (settings.deepspeed.zero_stage, settings.deepspeed.base_dtype) == (stage, "fp16")
    assert (settings.msamp.level.name if settings.msamp.level else None) == level
    assert settings.msamp.use_te == name.endswith("_te")
    assert (settings.fp8.backend == "transformer_engine") == name.endswith("_te")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_deepspeed_takes_the_file(file):
    """DeepSpeed's own parser, not our picture of it; "auto" is filled in as Accelerate does."""
    theirs = pytest.importorskip("deepspeed.runtime.config")
    data = json.loads(file.read_text())
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if data.get(key) == "auto":
            data[key] = 8
    parsed = theirs.DeepSpeedConfig(data)
    assert parsed.zero_optimization_stage == config.load(file).deepspeed.zero_stage
