"""Small DeepSpeed jobs for the states tests: one model, every stage and level, what is left in memory and in files."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from ds_fp8 import zero
from ds_fp8.levels import BLOCK_SIZE, LEVELS
from ds_fp8.plan import Plan
from ds_fp8.plan.decisions import CommPlan, Fp8Plan, OptimPlan


class OddNet(nn.Module):
    """Sizes that are no multiples of a block, so partitions and blocks end in the middle of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(13, 37)
        self.wide = nn.Linear(37, 61)
        self.norm = nn.LayerNorm(61)
        self.head = nn.Linear(61, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.relu(self.wide(torch.relu(self.embed(x))))))


def make_plan(level: str = "O1", *, dtype: str = "bf16", stage: int = 2, wire: str = "none", **overrides: Any) -> Plan:
    """A plan for states and gradient wire alone, without FP8 layers; the wire is off unless it is asked for."""
    chosen = replace(LEVELS[level], gradient_wire=wire, weight_wire="none").override(**overrides)
    return Plan(
        modules=(),
        parameters=(),
        fp8=Fp8Plan(),
        optim=OptimPlan(level=chosen, base_dtype=dtype, zero_stage=stage),
        comm=CommPlan(gradient_wire=wire, gradient_wire_scope="all", weight_wire="none", block_size=BLOCK_SIZE),
        zero_stage=stage,
        world_size=2,
        base_dtype=dtype,
        device="cpu",
    )


def ds_config(stage: int, dtype: str = "bf16", *, gas: int = 1, clip: float = 1.0, **extra: Any) -> dict[str, Any]:
    """A DeepSpeed configuration on two ranks; `extra` goes to the top level, `zero` into zero_optimization."""
    zero_section = {"stage": stage, **extra.pop("zero", {})}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": gas,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True},
        },
        "gradient_clipping": clip,
        "zero_optimization": zero_section,
        "steps_per_print": 10**9,
        **extra,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True, **({"initial_scale_power": 8} if dtype == "fp16" else {})}
    return config


@contextmanager
def states_for(plan: Any) -> Any:
    """What activation does for `msamp`, without the rest of the plugin; nothing with `plan` None."""
    if plan is None:
        yield
        return
    original = DeepSpeedEngine._configure_optimizer

    def configure(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        zero.configure_optimizer(original, self, client_optimizer, model_parameters, plan, None)

    DeepSpeedEngine._configure_optimizer = configure
    try:
        yield
    finally:
        DeepSpeedEngine._configure_optimizer = original


def make_engine(config: dict[str, Any], plan: Any, **arguments: Any) -> Any:
    # DeepSpeed asks whether the CPU multiplies fp16 *fast*; torch multiplies it everywhere.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    torch.manual_seed(0)
    model = OddNet()
    optimizer = arguments.pop("optimizer", None)
    if optimizer is not None:
        arguments["optimizer"] = optimizer(model.parameters())
        config = {key: value for key, value in config.items() if key != "optimizer"}
    with states_for(plan):
        return deepspeed.initialize(model=model, config=config, **arguments)[0]


def batch(step: int, micro: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10000 * step + 100 * micro + rank)
    x = torch.randn(4, 13, generator=generator).to(dtype)
    return x, torch.randn(4, 5, generator=generator).to(dtype)


def train(engine: Any, steps: range, *, overflow_at: int | None = None) -> dict[str, Any]:
    """Train over `steps`; losses of this rank, gradient norms, skipped steps. The loss of step `overflow_at` is
    infinite.
    """
    dtype = next(engine.module.parameters()).dtype
    rank = dist.get_rank()
    losses, norms = [], []
    for step in steps:
        for micro in range(engine.gradient_accumulation_steps()):
            x, y = (tensor.to(engine.device) for tensor in batch(step, micro, rank, dtype))
            loss = (engine(x) - y).float().pow(2).mean()
            engine.backward(loss * float("inf") if overflow_at == step else loss)
            engine.step()
            losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    return {"losses": losses, "norms": norms, "skipped": engine.skipped_steps}


def full_weights(engine: Any) -> torch.Tensor:
    """All weights in fp32, as the model computes with them."""
    parts = []
    for param in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            parts.append(param.detach().float().reshape(-1).clone())
    return torch.cat(parts)


def storages(tensors: Any) -> dict[int, int]:
    """Bytes of every distinct storage, by address."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}


def run_case(case: dict[str, Any], ours: bool, steps: int = 4, *, overflow_at: int | None = None) -> dict[str, Any]:
    """One job of `case` (stage, dtype, level, overrides, config): losses, norms, weights, and what it was wrapped
    in.
    """
    engine = make_engine(
        ds_config(case["stage"], case.get("dtype", "bf16"), **case.get("config", {})),
        plan_of(case) if ours else None,
        **case.get("arguments", {}),
    )
    result = train(engine, range(steps), overflow_at=overflow_at)
    result["weights"] = full_weights(engine)
    result["wrapper"] = type(engine.optimizer).__name__
    engine.destroy()
    return result


def plan_of(case: dict[str, Any]) -> Any:
    return make_plan(
        case.get("level", "O1"),
        dtype=case.get("dtype", "bf16"),
        stage=case["stage"],
        **case.get("overrides", {}),
    )


def job(case: dict[str, Any], *, ours: bool = True, universal: bool = False) -> Any:
    """An engine of `case`, with our states or unmodified."""
    config = ds_config(case["stage"], case.get("dtype", "bf16"), **case.get("config", {}))
    if universal:
        config["checkpoint"] = {"load_universal": True}
    return make_engine(config, plan_of(case) if ours else None)


def load(engine: Any, folder: str, tag: str | None = None, **options: Any) -> Any:
    """Load as an attached engine does: look first."""
    from ds_fp8 import checkpoint

    return checkpoint.load_checkpoint(engine.load_checkpoint, engine, folder, tag, **options)


def batch_barrier() -> None:
    dist.barrier()
