"""ZeRO 3 with equal layers: what is on its way at each module, and when gradients are reduced. Called on real ranks."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn

WIDTH, LAYERS = 64, 16
NUMEL = WIDTH * WIDTH


class Model(nn.Module):
    """A table that no FP8 layer owns, as large as all layers together, and the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.table = nn.Embedding(LAYERS * WIDTH, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return x.float().square().mean()


def settings(bucket: int, **sections: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": bucket * NUMEL,
            "stage3_max_reuse_distance": 0,
            "reduce_bucket_size": 2 * NUMEL,
        },
        "steps_per_print": 10**9,
        **sections,
    }


def step(engine: Any, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    engine.backward(engine(torch.randint(0, LAYERS * WIDTH, (4, 16), generator=generator)))
    engine.step()


def start(bucket: int, frozen: bool, **sections: Any) -> Any:
    torch.manual_seed(0)
    model = Model()
    if frozen:
        model.layers.requires_grad_(requires_grad=False)
        model.table.requires_grad_()
    trained = [one for one in model.parameters() if one.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=settings(bucket, **sections))[0]


def ahead(rank: int, bucket: int, *, frozen: bool = False, **sections: Any) -> dict[str, Any]:
    """In a step that follows the trace: for each forward and backward of a layer, the layers on their way when it
    begins to compute; and the elements that were reduced by then.
    """
    engine = start(bucket, frozen, **sections)
    for _ in range(4):
        step(engine, rank)
    coordinator, optimizer = engine.optimizer.parameter_offload.param_coordinator, engine.optimizer
    registry = coordinator._PartitionedParameterCoordinator__inflight_param_registry.data
    weights = {id(layer.weight): number for number, layer in enumerate(engine.module.layers)}
    found: dict[str, Any] = {"forward": {}, "backward": {}, "reduced": {}}
    reduced: list[int] = []
    name = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
    original = getattr(optimizer, name)

    def scatter(params: Any, *args: Any) -> Any:
        reduced.extend(weights[id(one)] for one in params if id(one) in weights)
        return original(params, *args)

    setattr(optimizer, name, scatter)

    def look(phase: str, number: int) -> None:
        found[phase][number] = sorted(weights[id(one)] for one in registry if id(one) in weights)
        found["reduced"][phase, number] = len(reduced)

    handles = []
    for number, layer in enumerate(engine.module.layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, number=number: look("forward", number)))
        handles.append(layer.register_full_backward_pre_hook(lambda *_, number=number: look("backward", number)))
    step(engine, rank)
    for handle in handles:
        handle.remove()
    found["coordinator"] = type(coordinator).__name__
    engine.destroy()
    return found


FP8 = {"enabled": True, "backend": "torch", "recipe": "current"}


def everything(rank: int, world_size: int, bucket: int) -> dict[str, Any]:
    import ds_fp8

    ds_fp8.activate()
    o2, o3 = ({"msamp": {"enabled": True, "opt_level": level}} for level in ("O2", "O3"))
    return {
        "bf16": ahead(rank, bucket),
        "bf16, twice the bucket": ahead(rank, 2 * bucket),
        "fp8": ahead(rank, bucket, fp8=FP8),
        "O2": ahead(rank, bucket, fp8=FP8, **o2),
        "O3": ahead(rank, bucket, fp8=FP8, **o3),
        "O3, DeepSpeed's hooks": ahead(rank, bucket, fp8={**FP8, "zero3_hooks": "deepspeed"}, **o3),
        "frozen": ahead(rank, bucket, frozen=True, fp8={**FP8, "frozen_weights": "fp8"}),
    }
