"""Bytes that the kernel counts for one optimizer step, by stage and level; run inside a namespace by bench_wire.py.

The model is a stack of Linear and LayerNorm with an embedding, so that some parameters travel in 16 bits at O3. The
loopback carries what all ranks send; divided by ranks and parameters it is bytes per parameter and rank. All jobs run
one after another in the same ranks: starting Python and DeepSpeed takes longer than a job.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import nn
from wire_ranks import run_ranks, sent_bytes

WIDTH, LAYERS, TOKENS = 512, 8, 64
KINDS = ("deepspeed fp32", "deepspeed bf16", "O1", "O2", "O3")


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + torch.relu(layer(norm(x)))
        return x


def config_of(stage: int, kind: str, gas: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": gas,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 1000},
        "steps_per_print": 10**9,
        "communication_data_type": "fp32" if kind == "deepspeed fp32" else "bf16",
    }
    if kind.startswith("O"):
        config["fp8"] = {"enabled": True, "backend": "torch"}
        config["msamp"] = {"enabled": True, "opt_level": kind}
    return config


def on_ranks(rank: int, world_size: int, gas: int, steps: int) -> list[dict[str, Any]]:
    import ds_fp8

    ds_fp8.activate()
    jobs = [(stage, kind) for stage in (0, 1, 2, 3) for kind in KINDS if (stage, kind) != (0, "O3")]
    case = {"gas": gas, "world_size": world_size}
    return [
        {"stage": stage, "kind": kind, **case, **count(rank, world_size, stage, kind, gas, steps)}
        for stage, kind in jobs
    ]


def count(rank: int, world_size: int, stage: int, kind: str, gas: int, steps: int) -> dict[str, Any]:
    """Bytes of one job, over `steps` steps after two."""
    import deepspeed
    from deepspeed import comm as dist

    from ds_fp8.comm import counters

    torch.manual_seed(0)
    engine, *_ = deepspeed.initialize(model=Stack(), config=config_of(stage, kind, gas))
    numel = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    tokens = torch.randint(0, 64, (2, TOKENS), generator=torch.Generator().manual_seed(rank))

    def step() -> None:
        for _ in range(gas):
            engine.backward(engine(tokens).float().square().mean())
            engine.step()

    step()
    step()
    counters.reset()
    dist.barrier()
    before = sent_bytes()
    for _ in range(steps):
        step()
    dist.barrier()
    sent = sent_bytes() - before
    return {
        "bytes_per_parameter_rank_step": sent / world_size / numel / steps,
        "counted": {kind: value / numel / steps for kind, value in counters.sent.items()},
        "parameters": numel,
    }


if __name__ == "__main__":
    world_size, gas, steps = (int(argument) for argument in sys.argv[1:4])
    print(json.dumps(run_ranks(world_size, on_ranks, gas, steps)[0]))
