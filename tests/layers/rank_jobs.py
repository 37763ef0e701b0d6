"""What the ranks of test_ranks.py run; module-level functions, so that fresh processes can import them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_fp8.config.settings import DeepSpeedFacts, Fp8Settings, Settings
from ds_fp8.layers import Fp8Linear, swap_layers
from ds_fp8.plan import make_plan
from ds_fp8.recipe import Recipe
from tests.layers.small_models import Block, managed_by


class Net(nn.Module):
    """Two blocks, the second one recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = checkpoint(self.second, x, use_reentrant=False)
        return x.float().pow(2).mean()


def amaxes(rank: int, world_size: int, reduce_amax: bool) -> dict[str, torch.Tensor]:
    """One step with inputs of size 1 + rank and gradients of size 2 ** rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    recipe = Recipe(amax_history_len=4, reduce_amax=reduce_amax)
    fp8_state = swap_layers(model, make_plan(model, Settings(Fp8Settings(True, recipe=recipe)), world_size=world_size))
    model(torch.full((16, 32), 1.0 + rank)).mul(2.0**rank).sum().backward()
    fp8_state.update_scales()
    return {"scales": fp8_state.scales, "history": fp8_state.forward.history}


def train(rank: int, world_size: int, stage: int, kind: str, zero_init: bool) -> dict[str, Any]:
    """Three steps of two micro-batches under DeepSpeed; FP8 layers swapped by hand, as the engine hook does it."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 2,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    torch.manual_seed(0)
    if zero_init:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = Net()
    else:
        model = Net()
    recipe = Recipe(kind=kind, amax_history_len=4 if kind == "delayed" else 1024)
    facts = DeepSpeedFacts(zero_stage=stage, base_dtype="bf16")
    plan = make_plan(model, Settings(Fp8Settings(True, recipe=recipe), deepspeed=facts), world_size=world_size)
    fp8_state = swap_layers(model, plan, managed=True)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    managed_by(engine, fp8_state)
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    losses = []
    for step in range(3):
        for micro in range(2):
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank))
            loss = engine(x.bfloat16())
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        kept_quantized = [layer.layer_state.cached is not None for layer in layers]
    state = fp8_state.state_dict()
    return {
        "losses": torch.stack(losses),
        "digest": plan.digest(),
        "kept_quantized": kept_quantized,
        "scales": state["scales"],
        "updates": state["forward_folds"],
    }


def pipeline(rank: int, world_size: int, checkpoint_interval: int) -> dict[str, Any]:
    """Two stages, four micro-batches in flight, two steps; each stage keeps its own FP8 state."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    torch.manual_seed(0)
    model = PipelineModule(
        [nn.Linear(32, 32), Block(), Block(), nn.Linear(32, 32)],
        num_stages=world_size,
        loss_fn=nn.functional.mse_loss,
        partition_method="uniform",
        activation_checkpoint_interval=checkpoint_interval,
    )
    facts = DeepSpeedFacts(base_dtype="fp32")
    recipe = Recipe(amax_history_len=4)
    plan = make_plan(model, Settings(Fp8Settings(True, recipe=recipe), deepspeed=facts), world_size=1)
    fp8_state = swap_layers(model, plan, group=model._grid.get_data_parallel_group(), managed=True)
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 4,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    managed_by(engine, fp8_state)
    generator = torch.Generator().manual_seed(1)
    batches = iter([(torch.randn(16, 32, generator=generator),) * 2 for _ in range(8)])
    losses = []
    for _ in range(2):
        losses.append(engine.train_batch(data_iter=batches).detach())
    state = fp8_state.state_dict()
    return {
        "losses": torch.stack(losses),
        "scales": state["scales"],
        "updates": state["forward_folds"],
        "fp8": all(isinstance(layer, Fp8Linear) for layer in model.forward_funcs if isinstance(layer, nn.Linear)),
    }


def everything(rank: int, world_size: int) -> dict[Any, Any]:
    """All jobs of test_ranks.py in one set of processes: starting them costs more than the jobs."""
    found: dict[Any, Any] = {("amax", reduce): amaxes(rank, world_size, reduce) for reduce in (True, False)}
    for kind in ("delayed", "current", "block"):
        for stage in (1, 3):
            found[kind, stage] = train(rank, world_size, stage, kind, False)
    found["zero.Init"] = train(rank, world_size, 3, "delayed", True)
    # Last: a pipeline leaves its topology behind, which zero.Init then takes for its own.
    for interval in (0, 1):
        found["pipeline", interval] = pipeline(rank, world_size, interval)
    return found
