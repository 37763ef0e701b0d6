"""Bytes of living tensors in one process: before the first step, and after the end of engines. Called on real ranks."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from living import storages
from torch import nn

WIDTH, DEPTH = 256, 8
NUMEL = DEPTH * (WIDTH * WIDTH + WIDTH)


class Mlp(nn.Module):
    """Square layers, all of them aligned for FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x.float().square().mean()


def settings(stage: int, level: str | None) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 16,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": WIDTH * WIDTH,
            "allgather_bucket_size": WIDTH * WIDTH,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": WIDTH * WIDTH,
            "stage3_max_live_parameters": 0,
        },
        "steps_per_print": 10**9,
        **({"fp8": {"enabled": True, "backend": "torch"}} if level else {}),
        **({"msamp": {"enabled": True, "opt_level": level}} if level and level != "fp8" else {}),
    }


def start(stage: int, level: str | None) -> Any:
    torch.manual_seed(0)
    return deepspeed.initialize(model=Mlp(), config=settings(stage, level))[0]


def micro_batch(engine: Any, rank: int) -> None:
    data = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(rank)).bfloat16()
    engine.backward(engine(data))


def clear_scratch() -> None:
    """Message buffers that a CPU keeps between exchanges: at most eight of a round's size."""
    from ds_fp8.comm import scratch

    scratch._free.clear()


def at_rest(rank: int, stage: int, level: str | None) -> dict[str, float]:
    """Bytes per parameter: of a finished engine, with the gradients of the first step, and after that step."""
    before = storages()

    def resident() -> float:
        clear_scratch()
        return sum(size for pointer, (size, _) in storages().items() if pointer not in before) / NUMEL

    engine = start(stage, level)
    found = {"made": resident()}
    micro_batch(engine, rank)
    found["first gradients"] = resident()
    engine.step()
    found["stepped"] = resident()
    engine.destroy()
    return found


def left_over(rank: int, stage: int, level: str | None) -> dict[str, Any]:
    """Bytes per parameter that stay when an engine has trained and is destroyed, and nobody holds it or its model."""

    def life() -> None:
        engine = start(stage, level)
        for _ in range(3):
            micro_batch(engine, rank)
            engine.step()
        engine.destroy()

    life()  # what is made once for a process
    clear_scratch()
    before = storages()
    life()
    clear_scratch()
    left = {pointer: found for pointer, found in storages().items() if pointer not in before}
    gone = sum(size for pointer, (size, _) in before.items() if pointer not in storages())
    shown = sorted(left.values(), reverse=True)[:12]
    return {"left": sum(size for size, _ in left.values()) / NUMEL, "gone": gone / NUMEL, "shown": shown}


def rests(rank: int, world_size: int) -> dict[tuple[int, str], dict[str, float]]:
    import ds_fp8

    ds_fp8.activate()
    return {(stage, level): at_rest(rank, stage, level) for stage in (1, 2, 3) for level in ("O2", "O3")}


def lefts(rank: int, world_size: int, cases: list[tuple[int, str | None]]) -> dict[tuple[int, str | None], Any]:
    import ds_fp8

    ds_fp8.activate()
    return {case: left_over(rank, *case) for case in cases}
