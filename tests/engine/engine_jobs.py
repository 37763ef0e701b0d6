"""Small DeepSpeed jobs that engine tests run on real ranks; module-level functions, so that processes can import them."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import nn

WIDTH = 32


class Residual(nn.Module):
    """A pre-norm MLP block: what FP8 swaps, in the smallest size that is aligned."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks and a head of 7 outputs, which no FP8 product can take."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(), Residual()])
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).float().pow(2).mean()


def config(stage: int = 0, dtype: str = "bf16", gas: int = 1, **sections: Any) -> dict[str, Any]:
    """A DeepSpeed configuration with torch's AdamW, so that nothing is compiled."""
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    if dtype != "fp32":
        result[dtype] = {"enabled": True, **({"initial_scale_power": 8} if dtype == "fp16" else {})}
    return {**result, **sections}


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1000 * step + rank))


def dtype_of(settings: dict[str, Any]) -> torch.dtype:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if settings.get(name, {}).get("enabled"):
            return dtype
    return torch.float32


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter, gathered where ZeRO-3 has cut it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=None):
        return {name: value.detach().float().clone() for name, value in engine.module.named_parameters()}


def make_engine(settings: dict[str, Any], model: nn.Module | None = None, **initialize: Any) -> Any:
    import deepspeed

    torch.manual_seed(0)
    model = Net() if model is None else model
    initialize.setdefault("model_parameters", model.parameters())
    return deepspeed.initialize(model=model, config=settings, **initialize)[0]


def steps(engine: Any, settings: dict[str, Any], rank: int, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        for micro in range(settings["gradient_accumulation_steps"]):
            loss = engine(batch(rank, 10 * step + micro).to(dtype_of(settings)))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def train(rank: int, world_size: int, settings: dict[str, Any], plugin: bool, count: int = 4) -> dict[str, Any]:
    """Losses and final weights of one job, with the plugin active or really absent."""
    import ds_fp8
    import ds_fp8.engine

    if not plugin:
        ds_fp8.deactivate()
    else:
        ds_fp8.activate()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        engine = make_engine(settings)
    attachment = ds_fp8.engine.of(engine)
    return {
        "losses": steps(engine, settings, rank, 0, count),
        "weights": full_weights(engine),
        "attached": attachment is not None,
        "said": said.getvalue(),
        "kinds": sorted({type(module).__name__ for module in engine.module.modules()}),
        "digest": attachment.plan.digest() if attachment else None,
    }


def refused(rank: int, world_size: int, settings_by_rank: list[dict[str, Any]]) -> str:
    """The error that this rank gets; the empty string if the engine was made."""
    import ds_fp8
    from ds_fp8.errors import DsFp8Error

    ds_fp8.activate()
    try:
        make_engine(settings_by_rank[rank % len(settings_by_rank)])
    except DsFp8Error as error:
        return f"{type(error).__name__}: {error}"
    return ""
