"""Small DeepSpeed jobs that engine tests run on real ranks; module-level functions, so that processes can import
them.
"""

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
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed asks for fp16 *instructions*; torch computes fp16 on any CPU, which is all a test needs.
    get_accelerator().is_fp16_supported = lambda: True
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


def several(rank: int, world_size: int, calls: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    """Some of the jobs of this file, one after the other in the same processes: starting those is what takes time."""
    return [globals()[name](rank, world_size, *arguments) for name, arguments in calls]


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


def resumed(rank: int, world_size: int, settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """Save in the middle; go on; load into a new engine; go on again. And both crossings with an unmodified run."""
    import ds_fp8

    ds_fp8.activate()
    baseline_settings = {key: value for key, value in settings.items() if key != "fp8"}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        first = make_engine(settings)
        steps(first, settings, rank, 0, 3)
        first.save_checkpoint(f"{folder}/ours", client_state={"note": 7})
        uninterrupted = steps(first, settings, rank, 3, 6)

        second = make_engine(settings)
        _, client_state = second.load_checkpoint(f"{folder}/ours")
        again = steps(second, settings, rank, 3, 6)

        baseline = make_engine(baseline_settings)
        baseline.load_checkpoint(f"{folder}/ours")
        baseline_from_ours = steps(baseline, settings, rank, 3, 5)
        baseline.save_checkpoint(f"{folder}/unmodified")

        third = make_engine(settings)
        third.load_checkpoint(f"{folder}/unmodified")
        ours_from_baseline = steps(third, settings, rank, 5, 7)
    return {
        "rank": rank,
        "uninterrupted": uninterrupted,
        "resumed": again,
        "client_state": {key: value for key, value in client_state.items() if key in ("note", "ds_fp8")},
        "baseline_from_ours": baseline_from_ours,
        "ours_from_baseline": ours_from_baseline,
        "module_keys": sorted(second.module.state_dict()),
        "baseline_keys": sorted(Net().state_dict()),
        "said": said.getvalue(),
    }


def client_optimizer_job(rank: int, world_size: int, settings: dict[str, Any], form: str) -> dict[str, Any]:
    """Parameters leave the model before `initialize` in the forms that scripts use; which ones did training change?"""
    import ds_fp8

    ds_fp8.activate()
    torch.manual_seed(0)
    model = Net()
    settings = dict(settings)
    half = list(model.parameters())
    groups = [{"params": half[:4], "lr": 1e-2}, {"params": half[4:], "lr": 5e-3, "weight_decay": 0.0}]
    handed: dict[str, Any] = {"model_parameters": model.parameters()}
    if form == "groups":
        handed = {"model_parameters": groups}
    elif form == "optimizer":
        del settings["optimizer"]
        settings["zero_allow_untested_optimizer"] = True
        handed = {"optimizer": torch.optim.AdamW(groups)}
    with contextlib.redirect_stdout(io.StringIO()):
        engine = make_engine(settings, model, **handed)
    before = full_weights(engine)
    steps(engine, settings, rank, 0, 3)
    after = full_weights(engine)
    return {
        "changed": sorted(name for name in before if not torch.equal(before[name], after[name])),
        "all": sorted(before),
    }


def zero_init_job(rank: int, world_size: int, settings: dict[str, Any]) -> dict[str, Any]:
    import deepspeed

    import ds_fp8
    import ds_fp8.engine

    ds_fp8.activate()
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = Net()
    with contextlib.redirect_stdout(io.StringIO()):
        engine = make_engine(settings, model)
    attachment = ds_fp8.engine.of(engine)
    swapped = sum(decision.kind == "Linear" for decision in attachment.plan.swaps)
    return {"swapped": swapped, "losses": steps(engine, settings, rank, 0, 6)}


class Recomputed(Net):
    """The same net with its blocks under activation checkpointing."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import deepspeed
        from torch.utils.checkpoint import checkpoint

        x = x.requires_grad_()
        for block in self.blocks:
            if self.kind == "torch":
                x = checkpoint(block, x, use_reentrant=False)
            elif self.kind == "deepspeed":
                x = deepspeed.checkpointing.checkpoint(block, x)
            else:
                x = block(x)
        return self.head(x).float().pow(2).mean()


def recompute_job(rank: int, world_size: int, settings: dict[str, Any], kind: str) -> dict[str, Any]:
    import ds_fp8
    import ds_fp8.engine

    ds_fp8.activate()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        engine = make_engine(settings, Recomputed(kind))
        losses = steps(engine, settings, rank, 0, 4)
    fp8_state = ds_fp8.engine.of(engine).fp8_state
    fp8_state.update_scales()
    return {"losses": losses, "scales": fp8_state.scales.clone()}


def pipeline_engine(settings: dict[str, Any]) -> Any:
    """Two pipeline stages of unmodified Linear layers, named 0, 2 and 4."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    import ds_fp8

    ds_fp8.activate()
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)]
    model = PipelineModule(layers=layers, num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform")
    with contextlib.redirect_stdout(io.StringIO()):
        return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]


def pipeline_patterns(rank: int, world_size: int, settings: dict[str, Any]) -> str:
    """The error of a pipeline with patterns, or the names of the layers that this stage swapped."""
    import ds_fp8.engine
    from ds_fp8.errors import DsFp8Error

    try:
        engine = pipeline_engine(settings)
    except DsFp8Error as error:
        return f"{type(error).__name__}: {error}"
    return " ".join(decision.fqn for decision in ds_fp8.engine.of(engine).plan.swaps)


def pipeline_job(rank: int, world_size: int, settings: dict[str, Any], count: int) -> dict[str, Any]:
    """A pipeline trained by `train_batch`."""
    import ds_fp8.engine

    engine = pipeline_engine(settings)
    data = [(batch(0, number).to(torch.bfloat16),) * 2 for number in range(3)]
    attachment = ds_fp8.engine.of(engine)
    before = attachment.fp8_state.scales.clone()
    losses = [engine.train_batch(iter(data)).item() for _ in range(count)]
    attachment.fp8_state.update_scales()
    return {
        "swapped": len(attachment.plan.swaps),
        "losses": losses,
        "scales_moved": not torch.equal(before, attachment.fp8_state.scales),
    }


def autocast_job(rank: int, world_size: int, settings: dict[str, Any], plugin: bool, count: int = 6) -> dict[str, Any]:
    """One job under DeepSpeed's `torch_autocast` section: in which dtype each parameter travels, and the losses."""
    from deepspeed.runtime.torch_autocast import get_comm_dtype

    import ds_fp8
    import ds_fp8.engine
    from ds_fp8.comm import counters

    ds_fp8.activate() if plugin else ds_fp8.deactivate()
    with contextlib.redirect_stdout(io.StringIO()):
        engine = make_engine(settings)
        counters.reset()
        losses = steps(engine, settings, rank, 0, count)
    return {
        "attached": ds_fp8.engine.of(engine) is not None,
        "comm_dtypes": {name: str(get_comm_dtype(param)) for name, param in engine.module.named_parameters()},
        "buckets": sorted(map(str, getattr(engine.optimizer, "ipg_buckets", {}))),
        "codes": counters.sent["gradient"],
        "norm": engine.get_global_grad_norm(),
        "losses": losses,
        "weights": full_weights(engine),
    }
