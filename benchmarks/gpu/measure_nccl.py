"""Several GPUs of one host over NCCL: the time of one exchange beside NCCL's own in bf16 and fp32, and trainings by
JSON.

exchange   a gradient of 1 GiB in bf16 (512M elements) on every rank; ours with its casts, NCCL's without any
gather     updated weights after a step: quantized values (O3) against 16 bits
training   the GPT of `measure_gpt` in ZeRO-2 and ZeRO-3, tokens/s of all ranks together
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from jobs import SECTIONS, train
from ledger import Ledger, main
from measure_gpt import JOB
from measure_wire import on_ranks

CUDA = torch.cuda.is_available()
RANKS = torch.cuda.device_count() if CUDA else 2
NUMEL = 2**29 if CUDA else 2**20
REPEATS = 10 if CUDA else 2


def timed(works: dict[str, Any], rank: int) -> dict[str, dict[str, float]]:
    """Milliseconds from a common start until this rank has its result; the works take turns."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(REPEATS + 2):
        for name, work in works.items():
            if CUDA:
                torch.cuda.synchronize()
            torch.distributed.barrier()
            begin = time.perf_counter()
            work()
            if CUDA:
                torch.cuda.synchronize()
            if turn >= 2:
                taken[name].append((time.perf_counter() - begin) * 1e3)
    return {
        name: {"ms": round(statistics.median(ms), 3), "least": round(min(ms), 3), "most": round(max(ms), 3)}
        for name, ms in taken.items()
    }


def exchange(rank: int, world_size: int) -> dict[str, Any]:
    """The mean of a gradient over the ranks: whole on each (as DeepSpeed's stages 0 to 2) or each owner its part."""
    from deepspeed import comm as dist

    from ds_fp8.comm import Wire, all_reduce, reduce_slices
    from ds_fp8.comm.gather import all_gather_shares
    from ds_fp8.comm.reduce import owner_bounds

    device = f"cuda:{rank}" if CUDA else "cpu"
    wire, average = Wire.named("e4m3", None), 1 / world_size
    gradient = torch.randn(NUMEL, device=device, generator=torch.Generator(device).manual_seed(rank))
    half = gradient.bfloat16()
    bounds = owner_bounds(NUMEL, world_size)
    own_sum = torch.empty(bounds[rank + 1] - bounds[rank], device=device)
    own_half = torch.empty(NUMEL // world_size, dtype=torch.bfloat16, device=device)
    quantized = torch.zeros(NUMEL, dtype=torch.uint8, device=device)
    everything = torch.empty_like(half)

    # Correct before fast: in place, so a few rounds later the numbers are no gradient any more.
    exact = half.float()
    dist.all_reduce(exact)
    found = all_reduce(half.clone(), None, wire=wire, average=average).float()
    error = float((found - exact * average).norm() / (exact * average).norm())
    assert error < 0.04, error
    del exact, found

    rows = timed(
        {
            "fp32 all-reduce": lambda: dist.all_reduce(gradient),
            "bf16 all-reduce": lambda: dist.all_reduce(half),
            "bf16 reduce-scatter": lambda: dist.reduce_scatter_tensor(own_half, half[: own_half.numel() * world_size]),
            "fp8 all-reduce, bf16 gradients": lambda: all_reduce(half, None, wire=wire, average=average),
            "fp8 to owners, bf16 gradients": lambda: reduce_slices(
                half.tensor_split(bounds[1:-1]), None, wire=wire, average=average, out=own_sum
            ),
            "bf16 all-gather of weights": lambda: dist.all_gather_into_tensor(everything, own_half),
            "all-gather of quantized values": lambda: all_gather_shares(quantized, bounds, None),
        },
        rank,
    )
    return {"rows": [{"exchange": name, **found} for name, found in rows.items()], "error": round(error, 4)}


def body(ledger: Ledger) -> None:
    ledger.record("ranks", RANKS)
    if CUDA:
        ledger.record("device", torch.cuda.get_device_name(0))
        if RANKS < 2:
            ledger.problem("two ranks", "one device")
            return

    def exchanges() -> list[dict[str, Any]]:
        ranks = on_ranks(RANKS, "nccl" if CUDA else "gloo", "exchange")
        ledger.record("relative error of the fp8 all-reduce", ranks[0]["error"])
        base = ranks[0]["rows"][1]["ms"]
        return [{**row, "x bf16 all-reduce": round(base / row["ms"], 2)} for row in ranks[0]["rows"]]

    ledger.attempt(f"one exchange of {NUMEL} elements", exchanges)
    rows: list[dict[str, Any]] = []
    small = {} if CUDA else {"depth": 2, "width": 256, "vocabulary": 512, "context": 64, "micro_batch": 2, "steps": 2}
    for stage in (2, 3):
        base = 0.0
        for name in ("bf16", "O2 + fp8", "O3 + fp8"):
            if ledger.left() < 45:
                ledger.problem(f"{name}, stage {stage}", f"{ledger.left():.0f} s of the budget are left")
                continue
            job = JOB | small | {"stage": stage, "sections": SECTIONS[name], "steps_timed_apart": True}
            found = train(job, min(ledger.left(), 150), RANKS)
            if "ms per step" not in found:
                ledger.problem(f"{name}, stage {stage}", str(found))
                continue
            base = base or found["tokens per s"]
            losses = found.pop("losses")
            ratio = {"x bf16": round(found["tokens per s"] / base, 3), "last losses": str(losses)}
            rows.append({"json": name, "stage": stage, **found, **ratio})
            ledger.record("training", rows)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    main("nccl", body, needs_cuda=False)
