"""Jobs from JSON whose reported gradient norm is held against an fp32 one that knows nothing of DeepSpeed.

Before every step the job's weights are copied into an unmodified fp32 model, which computes the gradient of all ranks'
batches by itself. Clipping is always active (`MAX_NORM` lies below every norm), so the factor that the step multiplies
with shows.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import deepspeed
import torch
from torch import nn

MAX_NORM = 1e-3
MICRO_BATCHES = 2
LEVELS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "O1": {"msamp": {"enabled": True, "opt_level": "O1"}, "fp8": {"enabled": False}},
    "O2": {"msamp": {"enabled": True, "opt_level": "O2"}, "fp8": {"enabled": False}},
    "O2 + FP8 products": {"msamp": {"enabled": True, "opt_level": "O2"}},
    "O3 + FP8 products": {"msamp": {"enabled": True, "opt_level": "O3"}},
}


def cases() -> list[tuple[int, str]]:
    """Stage and level; O3 needs ZeRO."""
    return [(stage, level) for stage in (0, 1, 2, 3) for level in LEVELS if stage or not level.startswith("O3")]


def model() -> nn.Module:
    torch.manual_seed(0)
    widths = (64, 256, 256, 64)
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def batch(step: int, micro: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10000 * step + 100 * micro + rank)
    return torch.randn(32, 64, generator=generator), torch.randn(32, 64, generator=generator)


def norm_in_fp32(copied: nn.Module, step: int, world_size: int) -> float:
    """2-norm of the mean gradient over all ranks and micro-batches at the weights of `copied`."""
    copied.zero_grad()
    for rank in range(world_size):
        for micro in range(MICRO_BATCHES):
            x, y = batch(step, micro, rank)
            ((copied(x) - y).pow(2).mean() / (world_size * MICRO_BATCHES)).backward()
    return torch.stack([param.grad.norm() for param in copied.parameters()]).norm().item()


def factor_of_step(engine: Any) -> float | None:
    """What the last step multiplied gradients with; None where DeepSpeed has scaled them in place."""
    scale = getattr(getattr(engine.optimizer, "optimizer", None), "grad_scale", None)
    return None if scale is None else float(scale)


def measure(rank: int, world_size: int, chosen: list[tuple[int, str]], steps: int) -> list[dict[str, Any]]:
    """Per case the norms reported and true, and the clip factors applied and due, step by step."""
    import ds_fp8

    ds_fp8.activate()
    rows = []
    for stage, level in chosen:
        config = {
            "train_micro_batch_size_per_gpu": 32,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "bf16": {"enabled": True},
            "gradient_clipping": MAX_NORM,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": stage},
            "steps_per_print": 10**9,
            **copy.deepcopy(LEVELS[level]),
        }
        engine, *_ = deepspeed.initialize(model=model(), config=config)
        copied = model()
        row: dict[str, Any] = {"stage": stage, "level": level, "reported": [], "true": [], "applied": [], "due": []}
        for step in range(steps):
            for param, other in zip(engine.module.parameters(), copied.parameters(), strict=True):
                with deepspeed.zero.GatheredParameters([param]):
                    other.data.copy_(param.detach())
            true = norm_in_fp32(copied, step, world_size)
            for micro in range(MICRO_BATCHES):
                x, y = (tensor.bfloat16() for tensor in batch(step, micro, rank))
                engine.backward((engine(x) - y).float().pow(2).mean())
                engine.step()
            row["reported"].append(float(engine.get_global_grad_norm()))
            row["true"].append(true)
            row["applied"].append(factor_of_step(engine))
            row["due"].append(min(1.0, MAX_NORM / true))
        rows.append(row)
        engine.destroy()
    return rows


def errors(found: list[float], expected: list[float]) -> list[float]:
    """Relative, step by step."""
    return [abs(a - b) / b for a, b in zip(found, expected, strict=True)]
