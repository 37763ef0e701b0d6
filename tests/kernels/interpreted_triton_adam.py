"""The fused Triton step of Adam, interpreted, against `reference_step`, bit for bit: every state, master and gradient.

Run by `test_triton.py` with TRITON_INTERPRET=1. Three steps with changing gradients, 1000 elements (a short last
block), so that states decode, change and encode again; zeros, a tiny and a huge block among them.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch

from ds_fp8 import numerics
from ds_fp8.formats import E4M3
from ds_fp8.kernels.adam import AdamStep, reference_step
from ds_fp8.kernels.triton import adam, adam_fast, launch, segments
from ds_fp8.levels import MASTERS, STATES
from ds_fp8.numerics import masters, states

assert launch.INTERPRETED, "run this file with TRITON_INTERPRET=1"

STATE_FORMATS = tuple(name for name, fmt in STATES.items() if fmt.triton is not None and fmt.holds_exp_avg_sq)
MASTER_FORMATS = tuple(name for name, fmt in MASTERS.items() if fmt.triton is not None)
"""Those that have a kernel here; PyTorch does the step of all others."""

NUMEL = 1000


def gradient(seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(NUMEL, generator=generator) * 1e-3
    grad[:128] = 0
    grad[128:256] *= 1e-7
    grad[256:384] *= 1e4
    return grad.to(dtype)


def make_step(dtype: torch.dtype, m: str, v: str, master: str, **changes: Any) -> AdamStep:
    generator = torch.Generator().manual_seed(1)
    param = (torch.randn(NUMEL, generator=generator) * 0.02).to(dtype)
    arguments: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    arguments |= {"decoupled": True, "step": 1, "grad_scale": 0.7, "seed": 11} | changes
    return AdamStep(
        param=param,
        grad=torch.zeros(NUMEL),
        exp_avg=states.new_state(m, NUMEL, "cpu"),
        exp_avg_sq=states.new_state(v, NUMEL, "cpu"),
        master=masters.new_master(master, param),
        **arguments,
    )


def compare(step: AdamStep, grad_dtype: torch.dtype = torch.bfloat16, steps: int = 3) -> None:
    """`steps` steps by the kernel and by the reference; every tensor must have the same bits."""
    counterpart = copy.deepcopy(step)
    for number in range(1, steps + 1):
        for one in (step, counterpart):
            one.step, one.grad = number, gradient(number, grad_dtype)
        adam.adam_step(step)
        reference_step(counterpart)
        for position, (found, wanted) in enumerate(zip(step.tensors(), counterpart.tensors(), strict=True)):
            same = found.contiguous().view(torch.uint8) == wanted.contiguous().view(torch.uint8)
            assert same.all(), f"step {number}, tensor {position} ({found.dtype}): {int((~same).sum())} bytes differ"


@pytest.fixture(params=[True, False], ids=["fast path", "general"])
def short(request, monkeypatch):
    """Both paths of a step: common tiles on their own, and everything by the general one."""
    if not request.param:
        monkeypatch.setattr(adam, "_has_fast_path", lambda step: False)
    return request.param


def gradient_of_one_size(seed: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed)) * 1e-3).to(dtype)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("master", adam_fast.MASTERS)
@pytest.mark.parametrize("v", adam_fast.ROOTS)
@pytest.mark.parametrize("m", adam_fast.MOMENTS)
def test_fast_path_tiles(m, v, master, rounding, monkeypatch):
    """Gradients of one size: all tiles but the last go the fast path, in each of its formats, with the same bits."""
    monkeypatch.setattr(sys.modules[__name__], "gradient", gradient_of_one_size)
    step = make_step(torch.bfloat16, m, v, master, rounding=rounding)
    assert adam._has_fast_path(step)
    compare(step)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("v", ["fp32", "bf16", "fp16", "e4m3", "e4m3_expanded"])
def test_int8_beside_every_root(v, rounding, short):
    compare(make_step(torch.bfloat16, "int8", v, "split24", rounding=rounding))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", STATE_FORMATS)
def test_every_state_format(name, rounding, short):
    """Both moments in each format, over a split24 bf16 master."""
    compare(make_step(torch.bfloat16, name, name, "split24", rounding=rounding))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    ("m", "v"),
    [("e4m3", "fp32"), ("e4m3", "bf16"), ("e4m3", "fp16"), ("e4m3_expanded", "fp16"), ("e4m3", "e4m3_expanded")],
)
def test_a_ratio_beside_another_root(m, v, rounding):
    """exp_avg in 8 bits is divided by what exp_avg_sq has just become, in whatever format that is."""
    compare(make_step(torch.bfloat16, m, v, "split24", rounding=rounding))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("master", MASTER_FORMATS)
def test_every_master_format(master, dtype, rounding):
    """Every master on every base; an fp32 parameter is its own master."""
    compare(make_step(dtype, "e4m3", "fp16", master, rounding=rounding), steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_gradient_dtype(dtype):
    compare(make_step(torch.bfloat16, "e4m3", "fp16", "split32"), dtype, steps=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"decoupled": False},
        {"weight_decay": 0.0},
        {"beta1": 0.4},
        {"bias_correction": False},
        {"grad_scale": torch.tensor(0.3)},
    ],
    ids=["L2", "no decay", "beta1 below half", "no bias correction", "grad_scale on the device"],
)
def test_every_variant_of_the_update(changes):
    compare(make_step(torch.bfloat16, "fp32", "fp32", "split32", **changes))


@pytest.mark.parametrize("m", ["e4m3", "int8"])
def test_an_infinite_gradient_spoils_its_block_alone(m):
    """It decodes to NaN, where a check can find it, and the other blocks go on."""
    step = make_step(torch.bfloat16, m, "fp16", "split24")
    counterpart = copy.deepcopy(step)
    for one in (step, counterpart):
        one.grad = gradient(1, torch.float32)
        one.grad[700] = float("inf")
    adam.adam_step(step)
    reference_step(counterpart)
    assert torch.equal(step.exp_avg.data, counterpart.exp_avg.data)
    assert torch.equal(step.exp_avg.scale_inv.isnan(), counterpart.exp_avg.scale_inv.isnan())
    assert torch.equal(step.param.isnan(), counterpart.param.isnan())


def test_many_weights_in_one_launch():
    """Amaxes and quantized weights of any length and place, each under its own scale; nothing beside them is
    written.
    """
    store = torch.randn(20_000, generator=torch.Generator().manual_seed(3)).bfloat16()
    bounds = [(0, 5000), (5008, 5009), (9000, 9000 + 4096), (14_000, 20_000)]
    chunks = [store[start:stop] for start, stop in bounds]
    store[14_003] = float("nan")
    assert torch.equal(segments.amaxes(chunks), torch.stack([numerics.amax(chunk) for chunk in chunks]))
    scales, quantized = torch.tensor([1.0, 2.0, 30.0, 0.5]), torch.full((20_000,), 9, dtype=torch.uint8)
    segments.quantize(chunks, scales, E4M3, [quantized[start:stop] for start, stop in bounds])
    wanted = torch.full((20_000,), 9, dtype=torch.uint8)
    for (start, stop), chunk, scale in zip(bounds, chunks, scales, strict=True):
        wanted[start:stop] = numerics.quantize(chunk, scale, E4M3).view(torch.uint8)
    assert torch.equal(quantized, wanted)


@pytest.mark.parametrize("master", ["split24", "split32"])
def test_a_weight_zeroed_in_place(master):
    """As in test_cpu_adam.py: zero beside the negative remainder of what was there is zero, not NaN."""
    step = make_step(torch.bfloat16, "int8", "fp16", master)
    compare(step, steps=2)
    step.param[::2] = 0
    compare(step, steps=1)
    assert step.param.isfinite().all()
