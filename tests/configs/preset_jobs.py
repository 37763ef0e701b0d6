"""Trains a small net with a preset as it stands, on real ranks; a module of its own, so that processes can import
it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.engine.engine_jobs import dtype_of, make_engine, steps


def as_run(file: Path, world_size: int) -> dict[str, Any]:
    """The preset with what a small CPU job must change: batch of the net, torch's Adam, a short warm-up."""
    data = json.loads(file.read_text())
    data.update(train_batch_size=16 * world_size, train_micro_batch_size_per_gpu=16, gradient_accumulation_steps=1)
    optimizer = data.setdefault("optimizer", {"type": "AdamW", "params": {"lr": 1e-3}})
    optimizer["params"].update(torch_adam=True, lr=1e-2)
    data["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 2}}
    if "fp16" in data:
        data["fp16"]["initial_scale_power"] = 8
    return data


def train_presets(rank: int, world_size: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """name -> losses of some steps, what the layers became, the class of the optimizer."""
    import ds_fp8
    import ds_fp8.engine

    ds_fp8.activate()
    found = {}
    for name in names:
        data = as_run(Path(name), world_size)
        engine = make_engine(data)
        attachment = ds_fp8.engine.of(engine)
        found[Path(name).stem] = {
            "losses": steps(engine, data, rank, 0, 12),
            "kinds": sorted({type(module).__name__ for module in engine.module.modules()}),
            "attached": attachment is not None,
            "dtype": str(dtype_of(data)),
        }
        engine.destroy()
    return found
