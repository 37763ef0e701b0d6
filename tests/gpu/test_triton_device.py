"""Compiled Triton kernels on the device against `numerics` on the CPU, bit for bit, with integer and with hardware
casts.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ds_fp8 import kernels, numerics
from ds_fp8.comm.cut import cut_each
from ds_fp8.formats import E4M3, E5M2
from ds_fp8.kernels import self_test
from ds_fp8.kernels.adam import AdamStep, reference_step
from ds_fp8.kernels.triton import adam, blocks, launch
from ds_fp8.levels import MASTERS, STATES
from ds_fp8.numerics import flat, gemm_blocks, masters, states
from ds_fp8.numerics import messages as reference_messages
from ds_fp8.numerics.dtypes import torch_dtype
from ds_fp8.numerics.messages import Layout, message_bytes, message_views, row_numels
from ds_fp8.numerics.random_bits import Stochastic

STATE_FORMATS = tuple(name for name, fmt in STATES.items() if fmt.triton is not None and fmt.holds_exp_avg_sq)
MASTER_FORMATS = tuple(name for name, fmt in MASTERS.items() if fmt.triton is not None)
"""Those that have a kernel here; PyTorch does the step of all others."""

FORMATS = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)


@pytest.fixture(params=[True, False], ids=["hardware cast", "integer cast"], autouse=True)
def hardware(request, monkeypatch):
    """Every test twice: with the device's casts and as on one that has none, both give the reference's bits."""
    if not request.param:
        monkeypatch.setattr(launch, "_converts_fp8", lambda device: False)
    return request.param


def wide(numel: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    x = x * torch.exp2(torch.randint(-12, 12, (numel,), generator=generator).float())
    x[:128] = 0
    return x


def quantized_equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    nan = wanted.float().isnan()
    found, wanted = found.cpu().view(torch.uint8), wanted.view(torch.uint8)
    return bool(((found == wanted) | (nan & ((found & 0x7F) >= 0x7D))).all())


def same_values(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal, NaN where NaN is wanted."""
    return torch.equal(found.cpu().nan_to_num(nan=-3.0), wanted.nan_to_num(nan=-3.0))


@FORMATS
def test_all_bf16_values_and_all_halfway_cases(fmt):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    grid = torch.arange(256, dtype=torch.uint8).view(torch_dtype(fmt)).float()
    grid = grid[grid.isfinite()].sort().values
    middle = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([every, middle, middle.nextafter(grid[1:]), middle.nextafter(grid[:-1])])
    for scale in (1.0, 3.7):
        assert quantized_equal(
            kernels.quantize(x.cuda(), torch.tensor(scale).cuda(), fmt), numerics.quantize(x, scale, fmt)
        )


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_flat_partitions(fmt, dtype):
    """A million elements and a short block; nearest and stochastic; sums of three ranks."""
    x = wide(2**20 + 77).to(dtype)
    for rounding in (None, Stochastic(5, 2, 1)):
        quantized, scale_inv = kernels.flat_encode(x.cuda(), fmt, rounding=rounding)
        wanted, wanted_scale_inv = flat.encode(x, fmt, rounding=rounding)
        assert torch.equal(quantized.cpu(), wanted) and torch.equal(scale_inv.cpu(), wanted_scale_inv)
        back = kernels.flat_decode(quantized, scale_inv, fmt, dtype=dtype)
        assert torch.equal(back.cpu(), flat.decode(wanted, wanted_scale_inv, fmt, dtype=dtype))
    many = [flat.encode(wide(100_000, seed), fmt) for seed in range(3)]
    quantized, scale_inv = torch.stack([one for one, _ in many]), torch.stack([one for _, one in many])
    found = kernels.flat_sum(quantized.cuda(), scale_inv.cuda(), fmt, factor=1 / 3)
    assert torch.equal(found.cpu(), flat.sum_contributions(quantized, scale_inv, fmt, factor=1 / 3))
    again, again_scale_inv = kernels.flat_sum_encode(quantized.cuda(), scale_inv.cuda(), fmt, factor=1 / 3)
    wanted, wanted_scale_inv = flat.sum_and_encode(quantized, scale_inv, fmt, factor=1 / 3)
    assert torch.equal(again.cpu(), wanted) and torch.equal(again_scale_inv.cpu(), wanted_scale_inv)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_wires_messages(fmt, dtype):
    """As the wire calls: the better of two scales, quantized values and scales inside a message, the own slice uncast
    in the sum.
    """
    numel, size = 300_077, message_bytes(300_077)
    contributions = [wide(numel, seed).to(dtype) for seed in range(4)]
    contributions[1][-3] = float("inf")
    contributions[2][5 * 128 : 7 * 128] = 0
    own, others = contributions[0], contributions[1:]
    device, host = torch.zeros(3, size, dtype=torch.uint8, device="cuda"), torch.zeros(3, size, dtype=torch.uint8)
    for row, copied, x in zip(device, host, others, strict=True):
        kernels.encode_messages(x.cuda(), Layout((((0, numel),),)), fmt, row)
        flat.encode(x, fmt, best_of_two=True, out=message_views(copied, numel))
        assert torch.equal(row.cpu(), copied)
    arrived, wanted = message_views(device, numel), message_views(host, numel)
    found = kernels.flat_sum(*arrived, fmt, factor=0.25, own=own.cuda())
    assert same_values(found, flat.sum_contributions(*wanted, fmt, factor=0.25, own=own))
    back, back_host = torch.zeros(size, dtype=torch.uint8, device="cuda"), torch.zeros(size, dtype=torch.uint8)
    again = kernels.flat_sum_encode(
        *arrived, fmt, factor=0.25, own=own.cuda(), best_of_two=True, out=message_views(back, numel)
    )
    flat.sum_and_encode(*wanted, fmt, factor=0.25, own=own, best_of_two=True, out=message_views(back_host, numel))
    assert torch.equal(back.cpu(), back_host)
    target = torch.empty(numel, dtype=dtype, device="cuda")
    kernels.flat_decode(*again, fmt, out=target)
    assert same_values(target, flat.decode(*message_views(back_host, numel), fmt, dtype=dtype))


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unit", [4096, 1003])
def test_a_bucket_is_cast_from_where_it_lies(fmt, dtype, unit):
    """Chunks of 40 parameters for four ranks, by sixteen elements and not: messages and sums as of copies that lie
    together, with an infinity; the sum in the bucket's dtype and in fp32; rows of every rank decoded at once.
    """
    x = wide(40 * unit, 1).to(dtype)
    x[7 * unit + 5] = float("inf")
    cut = cut_each((unit,) * 40, 4)
    part = cut.whole(1)
    device = torch.zeros(sum(part.sent.bytes), dtype=torch.uint8, device="cuda")
    host = torch.zeros_like(device, device="cpu")
    kernels.encode_messages(x.cuda(), part.sent, fmt, device)
    reference_messages.encode_messages(x, part.sent, fmt, host)
    assert torch.equal(device.cpu(), host)
    numel = cut.numels[1]
    arrived = message_views(host[: 3 * message_bytes(numel)].view(3, -1), numel)
    there = tuple(one.contiguous().cuda() for one in arrived)
    for out_dtype in (dtype, torch.float32):
        found, wanted = torch.empty(numel, dtype=out_dtype, device="cuda"), torch.empty(numel, dtype=out_dtype)
        kernels.sum_messages(*there, fmt, x.cuda(), part.own, factor=0.25, out=found)
        reference_messages.sum_messages(*arrived, fmt, x, part.own, factor=0.25, out=wanted)
        assert same_values(found, wanted)
    share = 1280
    rows = host[: 4 * message_bytes(share)].view(4, -1)
    for total in (4 * share, 3 * share + 77, 2 * share):
        for row, length in zip(rows, row_numels(total, share, 4), strict=True):
            flat.encode(x[:length], fmt, best_of_two=True, out=message_views(row, length))
        found, wanted = torch.empty(total, dtype=dtype, device="cuda"), torch.empty(total, dtype=dtype)
        kernels.decode_rows(rows.cuda(), fmt, share, found)
        reference_messages.decode_rows(rows, fmt, share, wanted)
        assert same_values(found, wanted)


@FORMATS
def test_transposed_quantized_values_amax_and_blocks(fmt):
    x = wide(1000 * 720).view(1000, 720).bfloat16()
    quantized, amax = kernels.quantize_with_amax(x.cuda(), 3.7, fmt)
    transposed = torch.empty(720, 1000, dtype=torch_dtype(fmt), device="cuda")
    assert quantized_equal(quantized, numerics.quantize(x, 3.7, fmt))
    assert amax.item() == x.float().abs().max().item()
    assert torch.equal(kernels.dense(quantized.t()).view(torch.uint8), quantized.view(torch.uint8).t())
    straight = torch.empty_like(quantized), torch.empty(1000, 6, device="cuda")
    groups = torch.empty_like(transposed), torch.empty(720, 8, device="cuda")
    blocks.quantize_groups(x.cuda(), fmt, straight, groups)
    for found, source in ((straight, x), (groups, x.t().contiguous())):
        wanted = gemm_blocks.quantize_1x128(source, fmt)
        assert quantized_equal(found[0], wanted[0]) and torch.equal(found[1].cpu(), wanted[1])
    found, wanted = kernels.quantize_128x128(x.cuda(), fmt), gemm_blocks.quantize_128x128(x, fmt)
    assert quantized_equal(found[0], wanted[0]) and torch.equal(found[1].cpu(), wanted[1])


def make_step(dtype: torch.dtype, m: str, v: str, master: str, rounding: str, numel: int = 100_003) -> AdamStep:
    param = (wide(numel, 1).clamp(-4, 4) * 0.01).to(dtype)
    arguments: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    return AdamStep(
        param=param,
        grad=torch.zeros(numel),
        exp_avg=states.new_state(m, numel, "cpu"),
        exp_avg_sq=states.new_state(v, numel, "cpu"),
        master=masters.new_master(master, param),
        decoupled=True,
        step=1,
        grad_scale=0.7,
        seed=11,
        rounding=rounding,
        **arguments,
    )


def on_device(step: AdamStep) -> AdamStep:
    copied = copy.deepcopy(step)
    copied.param, copied.grad = copied.param.cuda(), copied.grad.cuda()
    for holder in (copied.exp_avg, copied.exp_avg_sq, copied.master):
        for name, tensor in holder.tensors().items():
            setattr(holder, name, tensor.cuda())
    return copied


CASES = [(torch.bfloat16, name, name, "split24") for name in STATE_FORMATS]
CASES += [(dtype, "e4m3", "fp16", name) for dtype in (torch.bfloat16, torch.float16) for name in MASTER_FORMATS]
CASES += [(torch.float32, "e4m3", "fp16", "split32")]
CASES += [(torch.bfloat16, "int8", name, "split24") for name in STATE_FORMATS]
CASES += [(torch.bfloat16, "int8", "fp16", name) for name in MASTER_FORMATS]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("dtype", "m", "v", "master"), CASES, ids=str)
def test_the_fused_step_is_the_reference_step(dtype, m, v, master, rounding):
    """Three steps; every byte of states, master and parameter."""
    step = make_step(dtype, m, v, master, rounding)
    device = on_device(step)
    for number in range(1, 4):
        gradient = (wide(step.param.numel(), 10 + number) * 1e-3).bfloat16()
        step.step = device.step = number
        step.grad, device.grad = gradient, gradient.cuda()
        reference_step(step)
        kernels.adam_step(device)
        for position, (found, wanted) in enumerate(zip(device.tensors(), step.tensors(), strict=True)):
            differs = found.cpu().view(torch.uint8) != wanted.contiguous().view(torch.uint8)
            assert not differs.any(), f"step {number}, tensor {position}: {int(differs.sum())} bytes differ"


@pytest.mark.parametrize("short", [True, False], ids=["fast path", "general"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("master", ["split24", "fp16"])
def test_millions_of_quotients_and_roots(master, rounding, short, monkeypatch):
    """Gradients of one size and 4M elements: the short sequences round as IEEE asks in every one."""
    if not short:
        monkeypatch.setattr(adam, "_has_fast_path", lambda step: False)
    step = make_step(torch.bfloat16, "int8", "fp16", master, rounding, numel=2**22)
    device = on_device(step)
    for number in range(1, 3):
        gradient = torch.randn(2**22, generator=torch.Generator().manual_seed(number)) * 1e-3
        step.step = device.step = number
        step.grad, device.grad = gradient, gradient.cuda()
        reference_step(step)
        kernels.adam_step(device)
        for found, wanted in zip(device.tensors(), step.tensors(), strict=True):
            assert torch.equal(found.cpu().view(torch.uint8), wanted.view(torch.uint8))


def test_the_self_test_that_doctor_runs():
    assert self_test.disagreements("cuda") == []


def test_no_kernel_waits_for_the_device():
    """`set_sync_debug_mode("error")` raises at any copy to the host or wait inside."""
    step = on_device(make_step(torch.bfloat16, "e4m3", "fp16", "split24", "nearest"))
    step.grad_scale = torch.tensor(0.5, device="cuda")
    x = wide(4096).cuda()
    quantized, scale_inv = kernels.flat_encode(x, E4M3)
    kernels.adam_step(step)  # compiled before the check
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.flat_decode(*kernels.flat_encode(x, E4M3), E4M3)
        kernels.flat_sum(quantized.view(1, -1), scale_inv.view(1, -1), E4M3)
        kernels.amax(x)
        kernels.adam_step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
