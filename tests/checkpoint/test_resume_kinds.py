"""Checkpoints of DeepSpeed's other forms are not taken for damaged: experts in files of their own, other optimizers and
schedulers. Each is saved, loaded by a fresh engine, and goes on to the bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

pytestmark = [pytest.mark.dist, pytest.mark.slow]

WIDTH = 32
ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
FUSED = {"type": "AdamW", "params": {"lr": 1e-2}}
SGD = {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}}
CYCLE = {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2}}

CASES: dict[str, dict[str, Any]] = {
    "experts": {"stage": 2, "optimizer": ADAM, "moe": True},
    "experts at O2": {"stage": 2, "optimizer": ADAM, "moe": True, "level": "O2"},
    "DeepSpeed's own Adam at stage 0": {"stage": 0, "optimizer": FUSED},
    "SGD at stage 0": {"stage": 0, "optimizer": SGD},
    "a cycle of learning rates at stage 3": {"stage": 3, "optimizer": ADAM, "level": "O2", "scheduler": CYCLE},
    "a plateau whose best loss is infinite": {"stage": 1, "optimizer": ADAM, "plateau": True},
    "Adafactor, whose eps is a pair": {"stage": 1, "adafactor": True},
    "a script's scheduler, whose list grows": {"stage": 1, "optimizer": ADAM, "growing": True},
    "states on the host": {"stage": 2, "optimizer": FUSED, "zero": {"offload_optimizer": {"device": "cpu"}}},
}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.first = nn.Linear(WIDTH, WIDTH)
        self.moe = MoE(WIDTH, expert=nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), num_experts=2, k=1)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.moe(self.first(x))[0])


class Growing(torch.optim.lr_scheduler.LambdaLR):
    """Keeps every rate it has had."""

    def __init__(self, optimizer: Any) -> None:
        self.had: list[Any] = ["none yet"]
        super().__init__(optimizer, lambda step: 1 / (1 + step))

    def step(self, *args: Any) -> None:
        super().step(*args)
        self.had.append(self.get_last_lr()[0])


def make(case: dict[str, Any]) -> Any:
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    torch.manual_seed(0)
    model = Experts() if case.get("moe") else nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "bf16": {"enabled": True},
        **({"optimizer": case["optimizer"]} if "optimizer" in case else {"zero_allow_untested_optimizer": True}),
        "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
        "fp8": {"enabled": True, "recipe": "delayed", "amax_history_len": 4},
        "steps_per_print": 10**9,
    }
    if "level" in case:
        config["msamp"] = {"enabled": True, "opt_level": case["level"]}
    if "scheduler" in case:
        config["scheduler"] = case["scheduler"]
    given: dict[str, Any] = {}
    if case.get("moe"):
        groups = {"params": list(model.parameters()), "name": "all"}
        given["model_parameters"] = split_params_into_different_moe_groups_for_optimizer(groups)
    if case.get("plateau"):
        given["lr_scheduler"] = torch.optim.lr_scheduler.ReduceLROnPlateau
    if case.get("adafactor"):
        given["optimizer"] = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    if case.get("growing"):
        given["lr_scheduler"] = Growing
    return deepspeed.initialize(model=model, config=config, **given)[0]


def train(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)  # gates draw noise
        x = torch.randn(8, WIDTH).bfloat16()
        loss = (engine(x) - x).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def resume(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for number, (name, case) in enumerate(CASES.items()):
        engine = make(case)
        train(engine, range(2))
        engine.save_checkpoint(f"{folder}/{number}", tag="a")
        wanted = train(engine, range(2, 4))
        engine.destroy()
        engine = make(case)
        engine.load_checkpoint(f"{folder}/{number}")
        results[name] = (wanted, train(engine, range(2, 4)))
        engine.destroy()
    return results


def test_each_goes_on_to_the_bit(tmp_path):
    for name, (wanted, found) in run_ranks(1, resume, str(tmp_path))[0].items():
        assert found == wanted, name
