"""Error of the mean gradient: real ranks for small W, the same casts and sums in one process for W = 64."""

from __future__ import annotations

import math
from typing import Any

import torch
from wire_ranks import run_ranks

DISTRIBUTIONS = ("normal", "lognormal")
CORRELATIONS = (0.0, 0.2, 0.9, 1.0)


def contribution(rank: int, numel: int, distribution: str, correlation: float) -> torch.Tensor:
    """One rank's gradient: a part that all ranks share, a part of its own; lognormal has magnitudes over decades.

    lognormal: each element's size is exp(2 z), z normal and the same on all ranks, as weights have large and small
    gradients wherever they are computed.
    """
    shared = torch.randn(numel, generator=torch.Generator().manual_seed(7))
    own = torch.randn(numel, generator=torch.Generator().manual_seed(100 + rank))
    value = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    if distribution == "lognormal":
        value *= torch.randn(numel, generator=torch.Generator().manual_seed(8)).mul_(2.0).exp_()
    return value * 1e-3


def exact_mean(world_size: int, numel: int, distribution: str, correlation: float) -> torch.Tensor:
    total = torch.zeros(numel, dtype=torch.float64)
    for rank in range(world_size):
        total += contribution(rank, numel, distribution, correlation).double()
    return total / world_size


def on_ranks(rank: int, world_size: int, numel: int, wires: list[str]) -> list[dict[str, Any]]:
    from ds_fp8.comm import Wire, all_reduce, reduce_slices
    from ds_fp8.comm.reduce import owner_bounds

    rows = []
    bounds = owner_bounds(numel, world_size)
    for distribution in DISTRIBUTIONS:
        for correlation in CORRELATIONS:
            exact = exact_mean(world_size, numel, distribution, correlation)
            for name in wires:
                x = contribution(rank, numel, distribution, correlation)
                half = reduce_slices(x.tensor_split(bounds[1:-1]), None, wire=Wire.named(name), average=1 / world_size)
                share = exact[bounds[rank] : bounds[rank + 1]]
                whole = all_reduce(x, None, wire=Wire.named(name), average=1 / world_size).double()
                squares = torch.stack([(half.double() - share).square().sum(), share.square().sum()])
                torch.distributed.all_reduce(squares)
                rows.append(
                    {
                        "world_size": world_size,
                        "distribution": distribution,
                        "correlation": correlation,
                        "wire": name,
                        "zero_half": float((squares[0] / squares[1]).sqrt()),
                        "stage0": float((whole - exact).norm() / exact.norm()),
                    }
                )
    return rows


def simulated(world_size: int, numel: int, wires: list[str]) -> list[dict[str, Any]]:
    """One owner of the whole tensor: its own contribution enters uncast, the others in quantized form, as in
    comm.reduce.
    """
    from ds_fp8 import kernels
    from ds_fp8.formats import FORMATS

    rows = []
    for distribution in DISTRIBUTIONS:
        for correlation in CORRELATIONS:
            exact = exact_mean(world_size, numel, distribution, correlation)
            for name in wires:
                fmt = FORMATS[name]
                total = contribution(0, numel, distribution, correlation)
                for rank in range(1, world_size):
                    quantized, scale_inv = kernels.flat_encode(
                        contribution(rank, numel, distribution, correlation), fmt, best_of_two=True
                    )
                    total += kernels.flat_decode(quantized, scale_inv, fmt)
                total /= world_size
                again = kernels.flat_decode(*kernels.flat_encode(total, fmt, best_of_two=True), fmt)
                rows.append(
                    {
                        "world_size": world_size,
                        "distribution": distribution,
                        "correlation": correlation,
                        "wire": name,
                        "simulated": True,
                        "zero_half": float((total - exact).norm() / exact.norm()),
                        "stage0": float((again - exact).norm() / exact.norm()),
                    }
                )
    return rows


def measure(numel: int, world_sizes: tuple[int, ...], wires: list[str]) -> list[dict[str, Any]]:
    rows = []
    for world_size in world_sizes:
        rows += run_ranks(world_size, on_ranks, numel, wires)[0]
    return rows + simulated(64, numel, wires)
