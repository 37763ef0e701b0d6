"""Seconds of one exchange between two ranks; run inside a namespace by bench_wire.py.

Contestants, in turn: all-reduce of fp32 and of bf16 (what DeepSpeed does), and ours in both halves and in one.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from wire_ranks import run_ranks


def on_ranks(rank: int, world_size: int, numel: int, repeats: int, chunk_numel: int | None) -> dict[str, Any]:
    from deepspeed import comm as dist

    from ds_fp8.comm import Wire, all_reduce, reduce_slices
    from ds_fp8.comm.reduce import owner_bounds

    wire = Wire.named("e4m3", chunk_numel)
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(rank))
    half = gradient.bfloat16()
    bounds = owner_bounds(numel, world_size)
    own_sum = torch.empty(bounds[rank + 1] - bounds[rank])
    average = 1 / world_size
    contestants = {
        "fp32 all-reduce": (gradient, dist.all_reduce),
        "bf16 all-reduce": (half, dist.all_reduce),
        "fp8 all-reduce, fp32 gradients": (gradient, lambda x: all_reduce(x, None, wire=wire, average=average)),
        "fp8 all-reduce, bf16 gradients": (half, lambda x: all_reduce(x, None, wire=wire, average=average)),
        "fp8 to owners, bf16 gradients": (
            half,
            lambda x: reduce_slices(x.tensor_split(bounds[1:-1]), None, wire=wire, average=average, out=own_sum),
        ),
    }
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    worked: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, (source, exchange) in contestants.items():
            x = source.clone()
            dist.barrier()
            begun, begun_cpu = time.perf_counter(), time.process_time()
            exchange(x)
            dist.barrier()
            if turn:
                taken[name].append(time.perf_counter() - begun)
                worked[name].append(time.process_time() - begun_cpu)
    # Correct before fast: the FP8 mean is the mean.
    exact = sum(torch.randn(numel, generator=torch.Generator().manual_seed(r)) for r in range(world_size)) * average
    found = all_reduce(gradient.clone(), None, wire=wire, average=average)
    error = float((found - exact).norm() / exact.norm())
    assert error < 0.04, error
    return {
        name: {
            "median_s": statistics.median(seconds),
            "least_s": min(seconds),
            "most_s": max(seconds),
            # of all threads of this rank, the kernel's copies included: what a busy machine does not blur
            "cpu_s": statistics.median(worked[name]),
        }
        for name, seconds in taken.items()
    }


if __name__ == "__main__":
    numel, repeats, chunk = (int(argument) for argument in sys.argv[1:4])
    print(json.dumps(run_ranks(2, on_ranks, numel, repeats, chunk or None)[0]))
