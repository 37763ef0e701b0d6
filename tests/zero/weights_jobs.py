"""Small jobs for O3: the same model trained with weights gathered in 16 bits and in quantized form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from ds_fp8.config.settings import DeepSpeedFacts, Fp8Settings, MsampSettings, Settings
from ds_fp8.layers import swap_layers
from ds_fp8.levels import LEVELS
from ds_fp8.plan import make_plan
from ds_fp8.recipe import Recipe
from ds_fp8.zero import specializing, wire
from tests.layers.small_models import managed_by

WIDTHS = (32, 144, 48)


class Mixed(nn.Module):
    """FP8 weights between parameters that no FP8 layer owns, so that every partition holds some of both."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(21, WIDTHS[0])
        self.up = nn.Linear(WIDTHS[0], WIDTHS[1])
        self.norm = nn.LayerNorm(WIDTHS[1])
        self.down = nn.Linear(WIDTHS[1], WIDTHS[2], bias=False)
        self.head = nn.Linear(WIDTHS[2], 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.down(self.norm(torch.relu(self.up(self.table(tokens)))))))


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(0, 21, (4, 16), generator=generator), torch.randint(0, 7, (4, 16), generator=generator)


def start(
    stage: int,
    level: str,
    *,
    gas: int = 1,
    kind: str = "delayed",
    evaluates: bool = False,
    start_step: int = 0,
    backend: str = "torch",
    **zero: Any,
) -> tuple[Any, Any]:
    """An engine whose layers and wire are those of `level`; its optimizer states stay DeepSpeed's.

    backend  of the layers; transformer_engine needs the fake one installed (tests/layers/te)
    """
    torch.manual_seed(0)
    model = Mixed()
    settings = Settings(
        fp8=Fp8Settings(enabled=True, backend="torch", recipe=Recipe(kind=kind), eval=evaluates, start_step=start_step),
        msamp=MsampSettings(enabled=True, level=LEVELS[level]),
        deepspeed=DeepSpeedFacts(zero_stage=stage, base_dtype="bf16", optimizer="AdamW"),
    )
    plan = make_plan(
        model, settings, device=torch.device(get_accelerator().device_name()), world_size=dist.get_world_size()
    )
    fp8_state = swap_layers(model, replace(plan, fp8=replace(plan.fp8, backend=backend)), managed=True)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": gas,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100, **zero},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    managed_by(engine, fp8_state)
    optimizer = engine.optimizer
    specializing.compose(optimizer, specializing.wire_mixins(specializing.served(optimizer), plan))
    wire.attach(engine, optimizer, plan, fp8_state)
    return engine, fp8_state


def forward_loss(engine: Any, step: int, device: Any = None) -> torch.Tensor:
    """`engine`, or a module on `device`."""
    tokens, targets = (tensor.to(device or engine.device) for tensor in batch(step, dist.get_rank()))
    return torch.nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), targets.flatten())


def take_steps(engine: Any, fp8_state: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        for micro in range(engine.gradient_accumulation_steps()):
            loss = forward_loss(engine, 10 * step + micro)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter in 16 bits, as an export would write it."""
    if engine.zero_optimization_stage() < 3:
        return {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            found[name] = param.detach().clone()
    return found
