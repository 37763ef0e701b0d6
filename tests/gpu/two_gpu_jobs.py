"""Jobs of two ranks with a GPU each, as a user starts them: a JSON, `deepspeed.initialize`, NCCL for everything."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from gpu.test_training_device import Net

import ds_fp8
from ds_fp8.comm import counters

FP8 = {"enabled": True, "recipe": "delayed", "backend": "torch"}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def make_engine(case: dict[str, Any]) -> Any:
    """case: stage, level (None: DeepSpeed alone), and optionally gas, zero (more of that section), fp8, msamp."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": case.get("gas", 1),
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": case["stage"],
            "stage3_param_persistence_threshold": 100,
            **case.get("zero", {}),
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    if case["level"] is not None:
        config["fp8"] = FP8 | case.get("fp8", {})
        # FP8 on the wire also where "auto" would leave it to NVLink.
        config["msamp"] = {"enabled": True, "opt_level": case["level"], "gradient_wire_scope": "all"} | case.get(
            "msamp", {}
        )
    model = Net()
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def train(engine: Any, rank: int, steps: range) -> list[float]:
    losses = []
    for step in steps:
        for micro in range(engine.gradient_accumulation_steps()):
            generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
            loss = engine(torch.randn(32, 128, generator=generator).to(engine.device, torch.bfloat16))
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
    return losses


def full_weights(engine: Any) -> torch.Tensor:
    """All weights in 16 bits, on every rank."""
    parts = []
    for param in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([param]):
            parts.append(param.detach().reshape(-1).float().cpu().clone())
    return torch.cat(parts)


def trained(rank: int, world_size: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Six steps of each case: losses, weights, and the gradient bytes sent beside those that DeepSpeed would send."""
    ds_fp8.activate()
    rows = []
    for case in cases:
        engine = make_engine(case)
        counters.reset()
        row = {"case": case, "losses": train(engine, rank, range(6))}
        row |= {"sent": dict(counters.sent), "instead": dict(counters.instead), "weights": full_weights(engine)}
        rows.append(row)
        engine.destroy()
    return rows


def resumed(rank: int, world_size: int, case: dict[str, Any], folder: str) -> tuple[list[float], list[float]]:
    """Losses of steps 3 to 5, at once and after a save and a load into a fresh engine."""
    ds_fp8.activate()
    engine = make_engine(case)
    train(engine, rank, range(3))
    engine.save_checkpoint(folder)
    wanted = train(engine, rank, range(3, 6))
    engine.destroy()
    engine = make_engine(case)
    engine.load_checkpoint(folder)
    return wanted, train(engine, rank, range(3, 6))


def wire_functions(rank: int, world_size: int) -> dict[str, bool]:
    """Each function of the wire on device tensors over NCCL, beside the same on CPU tensors over gloo: the same
    bits?
    """
    from ds_fp8.comm import Wire, all_reduce, reduce_slices
    from ds_fp8.comm.gather import all_gather_shares
    from ds_fp8.comm.reduce import owner_bounds

    numel, average, found = 1_000_003, 1 / world_size, {}
    uneven = [0, numel // 3, numel]
    for dtype in (torch.bfloat16, torch.float32):
        gradient = torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(dtype)
        for name in ("e4m3", "e5m2", "none"):
            # Two rounds and a short one, so that casts, sums and messages of three rounds are in flight together.
            wire = Wire.named(name, 400_000)
            calls = {
                "reduce": lambda d, w=wire, g=gradient: reduce_slices(
                    g.to(d).tensor_split(owner_bounds(numel, world_size)[1:-1]), None, wire=w, average=average
                ),
                "reduce, uneven": lambda d, w=wire, g=gradient: reduce_slices(
                    g.to(d).tensor_split(uneven[1:-1]), None, wire=w, average=average
                ),
                "all-reduce": lambda d, w=wire, g=gradient: all_reduce(g.to(d), None, wire=w, average=average),
            }
            for call, run in calls.items():
                found[f"{call}, {name}, {dtype}"] = torch.equal(run(f"cuda:{rank}").cpu(), run("cpu"))
    quantized = torch.arange(numel).to(torch.uint8) + rank
    for bounds in (uneven, [0, 500_000, 1_000_000]):
        stores = {}
        for device in ("cpu", f"cuda:{rank}"):
            store = torch.zeros(numel, dtype=torch.uint8, device=device)
            store[bounds[rank] : bounds[rank + 1]] = quantized[bounds[rank] : bounds[rank + 1]].to(device)
            all_gather_shares(store, bounds, None)
            stores[device] = store.cpu()
        found[f"gather {bounds}"] = torch.equal(*stores.values())
    return found
