"""JSON to resume with everything on: FP8 layers, FP8 wire, FP8 states, histories of the layers.

And where the memory goes: after a step no storage of the partition's size is fp32, and the master is the very slice of
the 16-bit weights that ZeRO holds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

pytestmark = pytest.mark.dist

WIDTH = 128


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.down(torch.relu(self.up(x)))).float().square().mean()


def make(stage: int, level: str) -> Any:
    import deepspeed

    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "fp8": {"enabled": True, "recipe": "delayed", "amax_history_len": 4},
        "msamp": {"enabled": True, "opt_level": level, "rounding": "stochastic"},
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=Net(), config=config)[0]


def train(engine: Any, rank: int, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank)).bfloat16()
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def work(rank: int, world_size: int, folder: str) -> dict:
    import ds_fp8

    ds_fp8.activate()
    results = {}
    for stage, level in ((0, "O2"), (1, "O2"), (2, "O2"), (3, "O2"), (2, "O3"), (3, "O3")):
        engine = make(stage, level)
        train(engine, rank, range(3))
        engine.save_checkpoint(f"{folder}/{stage}{level}", tag="a")
        expected = train(engine, rank, range(3, 6))
        shared = None
        if stage and level == "O2":
            masters, own = engine.optimizer.fp8_masters, engine.optimizer.fp8_slices()
            shared = all(
                m.data_ptr() == o.data_ptr() and m.dtype == torch.bfloat16 for m, o in zip(masters, own, strict=True)
            )
        engine.destroy()
        engine = make(stage, level)
        engine.load_checkpoint(f"{folder}/{stage}{level}", tag="a")
        results[f"stage {stage} {level}"] = (expected, train(engine, rank, range(3, 6)), shared)
        engine.destroy()
    return results


def test_resume_with_everything_on(tmp_path):
    for of_rank in run_ranks(2, work, str(tmp_path)):
        for name, (expected, resumed, shared) in of_rank.items():
            assert resumed == expected, name
            assert shared is not False, name
