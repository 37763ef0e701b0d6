"""Small DeepSpeed jobs for the wire tests: a model with odd sizes, a config per case, and the weights that come out."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from torch import nn

from ds_fp8.comm import Wire
from ds_fp8.zero import specializing, wire_engine
from ds_fp8.zero.wire import GradientWire

STEPS = 3


class OddNet(nn.Module):
    """Sizes that are no multiples of anything, a parameter larger than the bucket, one that stays out of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(13, 37)
        self.wide = nn.Linear(37, 61)
        self.norm = nn.LayerNorm(61)
        self.head = nn.Linear(61, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.relu(self.wide(torch.relu(self.embed(x))))))


def ds_config(*, dtype: str = "fp32", gas: int = 1, **zero: Any) -> dict[str, Any]:
    extra = zero.pop("extra", {})
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": gas,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        **extra,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True, **({"initial_scale_power": 8} if dtype == "fp16" else {})}
    return config


def put_on_wire(engine: Any, wire: Wire | None) -> None:
    """What activation does, without the rest of the plugin."""
    if wire is None:
        return
    gradient_wire = GradientWire(wire)
    wire_engine.install(engine, gradient_wire)
    row = next((row for row in specializing.SERVED if isinstance(engine.optimizer, row.wrapper)), None)
    if row is not None and row.gradients is not None:
        specializing.compose(engine.optimizer, [row.gradients])
        engine.optimizer.fp8_gradient_wire = gradient_wire


def batch(step: int, micro: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10000 * step + 100 * micro + rank)
    x = torch.randn(4, 13, generator=generator).to(dtype)
    return x, torch.randn(4, 5, generator=generator).to(dtype)


def train(config: dict[str, Any], wire: Wire | None, *, overflow_at: tuple[int, int] | None = None) -> dict[str, Any]:
    """Train OddNet; returns losses, the full weights, gradient norms and skipped steps.

    overflow_at  (step, rank) whose loss becomes infinite
    """
    torch.manual_seed(0)
    engine, *_ = deepspeed.initialize(model=OddNet(), config=config)
    put_on_wire(engine, wire)
    dtype = next(engine.module.parameters()).dtype
    rank = dist.get_rank()
    losses, norms, kept = [], [], []
    for step in range(STEPS):
        for micro in range(engine.gradient_accumulation_steps()):
            x, y = (tensor.to(engine.device) for tensor in batch(step, micro, rank, dtype))
            loss = (engine(x) - y).float().pow(2).mean()
            if overflow_at == (step, rank):
                loss = loss * float("inf")
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm() or 0.0))
        kept.append(full_weights(engine))
    result = {"losses": losses, "norms": norms, "kept": kept, "weights": kept[-1], "skipped": engine.skipped_steps}
    engine.destroy()
    return result


def full_weights(engine: Any) -> torch.Tensor:
    parts = []
    for param in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            parts.append(param.detach().float().reshape(-1).clone())
    return torch.cat(parts)
