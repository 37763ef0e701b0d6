"""Jobs whose checkpoints are kept from an earlier version, and how they were made.

`python tests/checkpoint/old_jobs.py FOLDER` trains each job for three steps, saves, trains three more, and writes one
archive for each job into FOLDER: the checkpoint and `losses.json` with the losses of the last three steps. The
archives in `tests/data/checkpoints` were written by version 0.1.0, before its private words were given up; they must
load for as long as the format is promised (docs/checkpoints.md).
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

WIDTH = 32

JOBS: dict[str, dict[str, Any]] = {
    "stage0_fp8_delayed": {"stage": 0, "fp8": {"recipe": "delayed", "amax_history_len": 4}},
    "stage0_O2": {"stage": 0, "fp8": {"recipe": "delayed"}, "msamp": {"opt_level": "O2"}},
    "stage1_O1_current": {"stage": 1, "fp8": {"recipe": "current"}, "msamp": {"opt_level": "O1"}},
    "stage2_O2_delayed": {"stage": 2, "fp8": {"recipe": "delayed"}, "msamp": {"opt_level": "O2"}},
    "stage2_O2_expanded": {
        "stage": 2,
        "fp8": {"recipe": "current"},
        "msamp": {
            "opt_level": "O2",
            "exp_avg": "e4m3_expanded",
            "exp_avg_sq": "e4m3_expanded",
            "rounding": "stochastic",
            "master": "fp16",
        },
    },
    "stage2_O3_delayed": {"stage": 2, "fp8": {"recipe": "delayed"}, "msamp": {"opt_level": "O3"}},
    "stage3_O3_block": {"stage": 3, "fp8": {"recipe": "block"}, "msamp": {"opt_level": "O3"}},
}
"""Name -> ZeRO stage and sections of the JSON."""


def make_engine(job: dict[str, Any]) -> Any:
    """The engine of one job, from JSON, one process."""
    import deepspeed
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.LayerNorm(2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": job["stage"]},
        "fp8": {"enabled": True, **job["fp8"]},
        "steps_per_print": 10**9,
    }
    if "scheduler" in job:
        config["scheduler"] = job["scheduler"]
    if "msamp" in job:
        config["msamp"] = {"enabled": True, **job["msamp"]}
    return deepspeed.initialize(model=model, config=config)[0]


def train(engine: Any, steps: range) -> list[float]:
    """Losses of `steps`, whose batches depend on the step's number alone."""
    import torch

    losses = []
    for step in steps:
        x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(step)).bfloat16()
        loss = (engine(x) - x).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def write(name: str, folder: Path) -> None:
    """Train job `name`, and put its checkpoint and its later losses into `folder/name.tar.xz`."""
    with tempfile.TemporaryDirectory() as place:
        engine = make_engine(JOBS[name])
        train(engine, range(3))
        engine.save_checkpoint(place, tag="three")
        later = train(engine, range(3, 6))
        engine.destroy()
        (Path(place) / "losses.json").write_text(json.dumps(later))
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / f"{name}.tar.xz", "w:xz") as archive:
            for path in sorted(Path(place).rglob("*")):
                if path.is_file() and path.name != "zero_to_fp32.py":
                    archive.add(path, path.relative_to(place))


if __name__ == "__main__":
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
    os.environ.setdefault("MASTER_PORT", "29517")
    for job_name in JOBS:
        write(job_name, Path(sys.argv[1]))
