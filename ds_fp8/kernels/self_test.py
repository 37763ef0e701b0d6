"""Do this device's kernels give the reference's bits? Asked of the machine itself, before a job trusts them.

Tests show that the source is right. Whether *this* compiler makes the right code of it is another question: ptxas 12.8
wrote every second code of a gradient as a copy of its neighbour, from PTX that was right, and the job trained on. So
each kernel of the wire, the casts and the optimizer step runs here once on awkward numbers (all exponents, zeros, an
infinity, a short last block), and its result is compared with `ds_fp8.numerics` on the CPU, bit for bit. That takes a
third of a second, and on a GPU the compilation of some thirty variants when nothing is cached yet.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..formats import E4M3, E5M2, Format
from ..numerics import flat, masters, row_scales, states
from ..numerics.random_bits import Stochastic
from . import dispatch, grouped
from .adam import AdamStep, reference_step

NUMEL = 40 * 128 + 77
RANKS = 3

Compared = tuple[str, Callable[[], tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]]
"""Name of a kernel, what the device gives, what the reference gives."""


def disagreements(device: torch.device | str) -> list[str]:
    """Names of the kernels of `device` that differ from the reference; empty when all agree, or PyTorch does the
    work.
    """
    if dispatch.path(device) == "torch":
        return []
    wrong = []
    for name, found, wanted in _all(torch.device(device)):
        if not all(_equal(one.detach().cpu(), other) for one, other in zip(found(), wanted(), strict=True)):
            wrong.append(name)
    return wrong


def _equal(found: Tensor, wanted: Tensor) -> bool:
    """Quantized values byte for byte, every NaN of ours has the same; numbers by value: zero has two signs, NaN many
    faces.
    """
    if wanted.element_size() == 1:
        return torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))
    return torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.nan_to_num(), wanted.nan_to_num())


def numbers(seed: int, numel: int = NUMEL) -> Tensor:
    """fp32 [numel]: 24 binades, a block of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator, dtype=torch.float32, device="cpu")
    x = x * torch.exp2(torch.randint(-12, 12, (numel,), generator=generator, device="cpu").float())
    x[128:256] = 0
    return x


def _all(device: torch.device) -> Iterator[Compared]:
    for fmt in (E4M3, E5M2):
        for dtype in (torch.float32, torch.bfloat16):
            label = f"{fmt.name} of {str(dtype).removeprefix('torch.')}"
            yield from _casts(device, fmt, dtype, label)
            yield from _wire(device, fmt, dtype, label)
    yield from _experts(device)
    for rounding in ("nearest", "stochastic"):
        for state, root, master in (("int8", "fp16", "split24"), ("e4m3", "fp16", "fp16")):
            yield _step(device, state, root, master, rounding)


def _casts(device: torch.device, fmt: Format, dtype: torch.dtype, label: str) -> Iterator[Compared]:
    x = numbers(1, 256 * 320).to(dtype).view(256, 320)
    here = x.to(device)
    yield (f"quantize, {label}",
           lambda: (dispatch.quantize(here, 3.7, fmt), dispatch.amax(here)),
           lambda: (numerics.quantize(x, 3.7, fmt), numerics.amax(x)))  # fmt: skip
    for name in ("quantize_1x128", "quantize_128x128"):
        yield (f"{name}, {label}",
               partial(getattr(dispatch, name), here, fmt), partial(getattr(numerics, name), x, fmt))  # fmt: skip


def _experts(device: torch.device) -> Iterator[Compared]:
    """Casts of stacked experts: by rows, and by columns of each, for tokens (with a table) and for weights
    (without).
    """
    x = numbers(5, 192 * 272).bfloat16().view(192, 272)
    table = torch.tensor([[1, 1, 3], [3, 3, 192], [16, 16, 208]], dtype=torch.int32, device="cpu")
    for name, one, where, room in (("tokens", x, table, 208), ("weights", x.view(2, 96, 272), None, 0)):
        here, there = one.to(device), None if where is None else where.to(device)

        def cast(casts: Any, one: Tensor, where: Tensor | None, room: int = room) -> tuple[Tensor, ...]:
            rows, amax = casts.quantize_rows_measured(one, E4M3, where)
            return (*rows, *casts.quantize_rows(one, E4M3), *casts.quantize_columns(one, amax, E4M3, where, room))

        yield f"casts of experts, {name}", partial(cast, grouped, here, there), partial(cast, row_scales, one, where)


def _wire(device: torch.device, fmt: Format, dtype: torch.dtype, label: str) -> Iterator[Compared]:
    x = numbers(2).to(dtype)
    x[-3] = float("inf")
    here = x.to(device)
    ways: dict[str, dict[str, Any]] = {"nearest": {}, "better of two scales": {"best_of_two": True}}
    for name, how in (ways | {"stochastic": {"rounding": Stochastic(5, 2, 1)}}).items():
        yield (f"flat_encode, {name}, {label}",
               partial(dispatch.flat_encode, here, fmt, **how), partial(flat.encode, x, fmt, **how))  # fmt: skip
    many = [flat.encode(numbers(seed), fmt) for seed in range(RANKS)]
    quantized, scale_inv = torch.stack([one for one, _ in many]), torch.stack([one for _, one in many])
    there = quantized.to(device), scale_inv.to(device)
    yield (f"flat_decode, {label}",
           lambda: (dispatch.flat_decode(there[0][0], there[1][0], fmt, dtype=dtype),),
           lambda: (flat.decode(quantized[0], scale_inv[0], fmt, dtype=dtype),))  # fmt: skip
    own = numbers(9).to(dtype)
    own_here = own.to(device)
    yield (f"flat_sum, {label}",
           lambda: (dispatch.flat_sum(*there, fmt, factor=1 / 3, own=own_here),),
           lambda: (flat.sum_contributions(quantized, scale_inv, fmt, factor=1 / 3, own=own),))  # fmt: skip
    yield (f"flat_sum_encode, {label}",
           lambda: dispatch.flat_sum_encode(*there, fmt, factor=1 / 3, own=own_here, best_of_two=True),
           lambda: flat.sum_and_encode(quantized, scale_inv, fmt, factor=1 / 3, own=own, best_of_two=True))  # fmt: skip


def _step(device: torch.device, state: str, root: str, master: str, rounding: str) -> Compared:
    """Two steps of Adam, every buffer."""
    param = (numbers(3).clamp(-4, 4) * 0.01).bfloat16()
    step = AdamStep(
        param=param, grad=(numbers(4) * 1e-3).bfloat16(), exp_avg=states.new_state(state, NUMEL, "cpu"),
        exp_avg_sq=states.new_state(root, NUMEL, "cpu"), master=masters.new_master(master, param), lr=1e-3, beta1=0.9,
        beta2=0.95, eps=1e-8, weight_decay=0.1, decoupled=True, step=1, grad_scale=0.7, seed=11, rounding=rounding,
    )  # fmt: skip
    on_device = copy.deepcopy(step)
    on_device.param, on_device.grad = on_device.param.to(device), on_device.grad.to(device)
    for holder in (on_device.exp_avg, on_device.exp_avg_sq, on_device.master):
        for name, tensor in holder.tensors().items():
            setattr(holder, name, tensor.to(device))

    def two_steps(one: AdamStep, run: Callable[[AdamStep], None]) -> tuple[Tensor, ...]:
        for number in (1, 2):
            one.step = number
            run(one)
        return tuple(one.tensors())

    return (f"adam_step, {state}, {root}, {master}, {rounding}",
            lambda: two_steps(on_device, dispatch.adam_step), lambda: two_steps(step, reference_step))  # fmt: skip
