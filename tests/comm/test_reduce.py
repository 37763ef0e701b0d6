"""Sums over ranks in FP8: right sum, right owner, error that falls with the ranks, and nothing that can hang."""

from __future__ import annotations

import sys

import pytest
import torch
from budget_jobs import Parts
from ranks import run_ranks

from ds_fp8.comm import Wire, all_reduce, counters, reduce_cut, reduce_slices, two_level_routes
from ds_fp8.comm.cut import cut_each
from ds_fp8.formats import E4M3, E5M2

pytestmark = pytest.mark.dist


def gradient(rank: int, numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000 * seed + rank))


def mean_of(world_size: int, numel: int) -> torch.Tensor:
    return torch.stack([gradient(rank, numel) for rank in range(world_size)]).mean(0)


def relative_error(measured: torch.Tensor, exact: torch.Tensor) -> float:
    return float((measured - exact).norm() / exact.norm())


def to_owners(rank, world_size, numel, bounds, wire_name, chunk_numel, dtype):
    tensor = gradient(rank, numel).to(dtype)
    wire = Wire.named(wire_name, chunk_numel)
    kept = tensor.clone()
    own = reduce_slices(tensor.tensor_split(bounds[1:-1]), None, wire=wire, average=1 / world_size)
    assert torch.equal(tensor, kept)
    return own


@pytest.mark.parametrize("bounds", [[0, 500, 1000], [0, 0, 1000], [0, 1000, 1000], [0, 37, 1000]])
@pytest.mark.parametrize("wire_name", ["e4m3", "e5m2", "none"])
def test_each_owner_gets_the_mean_of_its_slice(bounds, wire_name):
    """Uneven and empty slices; an e4m3 cast errs by at most 2^-4 of an element, e5m2 by 2^-3, and one of two is
    cast.
    """
    numel = bounds[-1]
    results = run_ranks(2, to_owners, numel, bounds, wire_name, None, torch.float32)
    assert [r.numel() for r in results] == [bounds[1] - bounds[0], bounds[2] - bounds[1]]
    limit = {"e4m3": E4M3.half_ulp, "e5m2": E5M2.half_ulp, "none": 2.0**-23}[wire_name]
    assert relative_error(torch.cat(results), mean_of(2, numel)) < limit / 2


def test_rounds_do_not_change_a_bit():
    """Cutting the exchange into rounds of 256 elements cuts between blocks: the same quantized values, the same
    sums.
    """
    bounds = [0, 1000, 1001, 1001, 3000]
    whole = run_ranks(4, to_owners, 3000, bounds, "e4m3", None, torch.bfloat16)
    rounds = run_ranks(4, to_owners, 3000, bounds, "e4m3", 256, torch.bfloat16)
    for a, b in zip(whole, rounds, strict=True):
        assert torch.equal(a, b)


def everything_on(rank, world_size):
    """Several small claims in one start of the processes."""
    found = {}
    numel = 5000
    exact = mean_of(world_size, numel)
    for name in ("e4m3", "e5m2", "none"):
        tensor = gradient(rank, numel)
        all_reduce(tensor, None, wire=Wire.named(name, 1024), average=1 / world_size)
        found[name] = (relative_error(tensor, exact), tensor)
    half = gradient(rank, numel).bfloat16()
    found["bf16"] = all_reduce(half, None, wire=Wire.named("e4m3"), average=1 / world_size)
    tiny = torch.full((3,), float(rank + 1))
    found["tiny"] = all_reduce(tiny, None, wire=Wire.named("e4m3"))
    bad = gradient(rank, 1000)
    if rank == world_size - 1:
        bad[5] = float("inf")
        bad[999] = float("nan")
    found["inf"] = all_reduce(bad, None, wire=Wire.named("e4m3"))
    equal = torch.ones(1000) * 3.0
    found["equal"] = all_reduce(equal, None, wire=Wire.named("e4m3"), average=1 / world_size)
    counters.reset()
    share = 128 * 100
    slices = [torch.ones(share, dtype=torch.bfloat16)] * world_size
    reduce_slices(slices, None, wire=Wire.named("e4m3"))
    found["bytes"] = dict(counters.sent)
    found["launches"] = launches(rank, world_size)
    return found


def launches(rank, world_size):
    """Of a bucket of two parameters in two rounds, and of an all-reduce in one: with the collective itself."""
    bucket, cut = (
        gradient(rank, 600 * world_size).bfloat16(),
        cut_each((256 * world_size, 344 * world_size), world_size),
    )
    out, wire = torch.empty(600, dtype=torch.bfloat16), Wire.named("e4m3", 384 * world_size)
    counted = []
    for work in (
        lambda: reduce_cut(bucket, cut, None, wire=wire, out=out),
        lambda: all_reduce(bucket, None, wire=Wire.named("e4m3")),
    ):
        with Parts() as parts:
            sys.setprofile(parts.profile)
            work()
            sys.setprofile(None)
        counted.append(parts.counts["other", "launches"])
    return counted


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_reduce_gives_every_rank_the_same_bits(world_size):
    """All ranks decode the same quantized values. Inf and NaN reach every rank; equal gradients cannot saturate."""
    results = run_ranks(world_size, everything_on)
    for name, limit in (("e4m3", 0.04), ("e5m2", 0.08), ("none", 1e-6)):
        assert results[0][name][0] < limit
        assert all(torch.equal(r[name][1], results[0][name][1]) for r in results)
    first = results[0]
    assert first["bf16"].dtype == torch.bfloat16
    assert first["tiny"].tolist() == [world_size * (world_size + 1) / 2] * 3
    for result in results:
        assert not result["inf"][5].isfinite()
        assert not result["inf"][999].isfinite()
        assert result["inf"][300:800].isfinite().all()
        # 3.0 / (3.0 / 448) = 448 is the largest code: a constant block survives both casts
        assert (result["equal"] - 3.0).abs().max() < 1e-5
    if world_size > 1:
        # Twice cast, exchange, sum; then cast, exchange, sum with cast, gather, and what gloo needs more than a GPU.
        assert first["launches"] == [6, 4 + 2 * (world_size - 1)], first["launches"]
    sent = first["bytes"]
    assert sent["gradient"] == 128 * 100 * (world_size - 1)
    assert sent["scale"] == 4 * 100 * (world_size - 1)


def test_the_relative_error_of_the_owners_half_rises_towards_that_of_one_cast():
    """The mean of independent gradients shrinks as its rounding errors do, and only a rank's own contribution is exact:
    a share 1 - 1 / W of the sum is rounded. So the error relative to the mean rises with W, towards one cast's (.0242;
    docs/wire.md).
    """
    errors = []
    for world_size in (2, 4):
        share = 4096 // world_size
        bounds = [share * d for d in range(world_size + 1)]
        results = run_ranks(world_size, to_owners, 4096, bounds, "e4m3", None, torch.float32)
        errors.append(relative_error(torch.cat(results), mean_of(world_size, 4096)))
    assert errors[0] < errors[1] < 0.0242
    assert errors[0] == pytest.approx(0.0242 * 0.5**0.5, rel=0.05), "at W = 2 half of the sum was rounded"


def on_two_nodes(rank, world_size):
    (route,) = two_level_routes([torch.distributed.group.WORLD], node_name=f"node{rank // 2}")
    numel = 3000
    bounds = [0, 1000, 1100, 1100, 3000]
    slices = gradient(rank, numel).tensor_split(bounds[1:-1])
    own = reduce_slices(slices, route, wire=Wire.named("e4m3"), average=1 / world_size)
    everywhere = all_reduce(gradient(rank, numel), route, wire=Wire.named("e4m3", 1024), average=1 / world_size)
    exact_inside = torch.ones(256) * (1 + rank % 2)
    all_reduce(exact_inside, route.inner, wire=Wire.named("none"))
    return own, everywhere, exact_inside[0].item()


def test_two_levels_reduce_to_the_same_owners():
    """Four ranks on two pretended nodes: fp32 inside, one FP8 contribution per node between them."""
    results = run_ranks(4, on_two_nodes)
    exact = mean_of(4, 3000)
    assert [r[0].numel() for r in results] == [1000, 100, 0, 1900]
    assert relative_error(torch.cat([r[0] for r in results]), exact) < 0.025
    assert all(torch.equal(r[1], results[0][1]) for r in results)
    assert relative_error(results[0][1], exact) < 0.04
    assert [r[2] for r in results] == [3.0] * 4


def on_unequal_nodes(rank, world_size):
    from ds_fp8.errors import BackendError

    try:
        two_level_routes([torch.distributed.group.WORLD], node_name=f"node{min(rank, 1)}")
    except BackendError as error:
        return str(error)


def test_unequal_nodes_are_refused_with_the_way_out():
    for message in run_ranks(3, on_unequal_nodes):
        assert "gradient_wire_scope" in message
        assert "[1, 2]" in message
