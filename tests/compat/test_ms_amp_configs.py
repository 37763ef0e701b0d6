"""MS-AMP's four example configurations, and what Accelerate writes, through the example's model.

The model is the small convolutional net of that example. None of its linear layers (400-120-84-10) is a multiple of 16
both ways, so no product runs in FP8, which msamp alone turns on but does not insist on: the plan says so, states and
gradients are in FP8 all the same. A second net has aligned layers. The files are those in `configs/`, unchanged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

pytestmark = pytest.mark.dist

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 6

WRAPPERS = {
    "ms_amp_plain.json": "FP16_UnfusedOptimizer",
    "ms_amp_o2.json": "Fp8FP16_UnfusedOptimizer",
    "ms_amp_zero_o3.json": "Fp8DeepSpeedZeroOptimizer",
    "ms_amp_zero_o3_te.json": "Fp8DeepSpeedZeroOptimizer",
    "accelerate_msamp.json": None,
}

EXAMPLE, ALIGNED = (120, 84), (128, 64)
JOBS = [(name, hidden) for name in WRAPPERS for hidden in (EXAMPLE, ALIGNED)]


class CifarNet(nn.Module):
    """Two convolutions, three linear layers, 32 x 32 colour images."""

    def __init__(self, hidden: tuple[int, int] = (120, 84)) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, hidden[0]), nn.Linear(*hidden), nn.Linear(hidden[1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def read(name: str) -> dict[str, Any]:
    config = json.loads((CONFIGS / name).read_text())
    # A schedule of 1000 warm-up steps would show nothing in six, and "auto" is Accelerate's to fill in.
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if config.get(key) == "auto":
            config[key] = 16 if key == "train_batch_size" else 8
    config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_max_lr": 1e-3}}
    config.setdefault("optimizer", {"type": "AdamW", "params": {"lr": 1e-3}})
    if "msamp" not in config or not config["msamp"].get("enabled"):
        config["optimizer"]["params"]["torch_adam"] = True  # DeepSpeed alone would compile its FusedAdam
    return config


def train(rank: int, world_size: int) -> dict[str, dict]:
    import deepspeed

    import ds_fp8

    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    ds_fp8.activate()
    results = {}
    for name, hidden in JOBS:
        torch.manual_seed(0)
        config = read(name)
        engine, *_ = deepspeed.initialize(model=CifarNet(hidden), config=config)
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
        labels = torch.arange(8) % 10
        losses = []
        for _ in range(STEPS):
            loss = nn.functional.cross_entropy(engine(images.to(next(engine.parameters()).dtype)).float(), labels)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        results[name, hidden] = {
            "losses": losses,
            "wrapper": type(engine.optimizer).__name__,
            "skipped": engine.skipped_steps,
        }
        engine.destroy()
    return results


@pytest.fixture(scope="module")
def results():
    return run_ranks(2, train)


@pytest.mark.parametrize(("name", "hidden"), JOBS)
def test_it_trains(results, name, hidden):
    """Finite losses that fall on one batch learnt by heart."""
    for of_rank in results:
        found = of_rank[name, hidden]
        assert all(loss == loss and loss < 10 for loss in found["losses"]), found
        if name != "ms_amp_plain.json":  # fp16 at stage 0: DeepSpeed's own updates are 2^15 too small
            assert found["losses"][-1] < found["losses"][0], found


@pytest.mark.parametrize("name", [name for name, wrapper in WRAPPERS.items() if wrapper])
def test_it_is_what_was_asked_for(results, name):
    assert results[0][name, EXAMPLE]["wrapper"] == WRAPPERS[name]
