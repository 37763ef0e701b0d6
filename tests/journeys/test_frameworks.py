"""Accelerate and the Hugging Face Trainer: they call `deepspeed.initialize` by themselves and meet the hooked engine."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.journeys.launching import PACKAGE_PARENT, door_folder, free_port, launch

pytestmark = pytest.mark.dist

HERE = Path(__file__).parent


def torchrun(folder: Path, script: str, *arguments: str, ranks: int = 2) -> str:
    """Ranks of a script of this folder, with the door open; what they said."""
    shutil.copy(HERE / script, folder / script)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += [f"--master_port={free_port()}"]
    path = f"{door_folder(folder / 'door')}:{PACKAGE_PARENT}"
    code, said = launch([*command, script, *arguments], folder, PYTHONPATH=path)
    assert code == 0, said
    return said


def write(folder: Path, **more) -> str:
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "fp8": {"enabled": True},
        **more,
    }
    (folder / "ds.json").write_text(json.dumps(config))
    return "ds.json"


def falling(said: str) -> bool:
    (line,) = [line for line in said.splitlines() if line.startswith("LOSSES")]
    first, *_, last = map(float, line.split()[2:])
    return last < first


def test_accelerate_with_its_deepspeed_plugin(tmp_path):
    """A client AdamW made before `prepare`; the banner comes once, the loss falls."""
    pytest.importorskip("accelerate", reason="needs accelerate")
    said = torchrun(tmp_path, "train_accelerate.py", write(tmp_path))
    assert said.count("ds_fp8: 2 of 3 Linear -> Fp8Linear") == 1 and falling(said), said


def test_hugging_face_trainer(tmp_path):
    """`TrainingArguments(deepspeed=...)`, optimizer from the JSON: 14 of 15 Linear of a Llama, all but its head; its norms are a class of its own."""
    pytest.importorskip("transformers", reason="needs transformers and accelerate")
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}
    said = torchrun(tmp_path, "train_hf.py", write(tmp_path, optimizer=optimizer), str(tmp_path / "out"))
    assert "14 of 15 Linear -> Fp8Linear" in said and falling(said), said


@pytest.mark.parametrize("way", ["plain", "deepspeed"])
def test_accelerate_with_its_ms_amp_backend(tmp_path, way):
    """`mixed_precision="fp8"`, backend MSAMP: `msamp.initialize` without DeepSpeed, `msamp.deepspeed.initialize` with it."""
    pytest.importorskip("accelerate", reason="needs accelerate")
    if way == "deepspeed":
        pytest.importorskip("transformers", reason="Accelerate's DeepSpeed plugin asks for its version")
    # On a CPU Accelerate counts one process and computes the batch size from that.
    said = torchrun(tmp_path, "train_accelerate_msamp.py", way, ranks=1 if way == "deepspeed" else 2)
    assert "ds_fp8: 3 of 3 Linear -> Fp8Linear" in said and "ds_fp8: msamp O2: exp_avg int8" in said, said
    assert falling(said), said
