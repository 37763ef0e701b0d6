"""Flat partitions on CPU: quantized (uint8) and one fp32 scale_inv per 128 elements; the counterpart of
`numerics/flat.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Format
from ...numerics.flat import blocks_of
from ...numerics.random_bits import Stochastic
from . import jobs
from .casts import decode_into, readable, run


def encode(
    x: Tensor,
    fmt: Format,
    rounding: Stochastic | None = None,
    best_of_two: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """x [n], fp32, bf16 or fp16 -> quantized uint8 [n], scale_inv fp32 [ceil(n / 128)]; one pass over x.

    out  contiguous buffers of the caller, say a message that is about to be sent
    """
    x = readable(x.detach())
    quantized, scale_inv = out or _new_quantized(x.numel())
    job = jobs.FlatEncodeJob(
        x.data_ptr(), quantized.data_ptr(), scale_inv.data_ptr(), x.numel(), jobs.DTYPES[x.dtype],
        jobs.FORMATS[fmt.name], rounding is not None, rounding.key if rounding else 0,
        rounding.first & 0xFFFFFFFF if rounding else 0, best_of_two,
    )  # fmt: skip
    run(jobs.FLAT_ENCODE, job, blocks_of(x.numel()))
    return quantized, scale_inv


def _new_quantized(numel: int) -> tuple[Tensor, Tensor]:
    quantized = torch.empty(numel, dtype=torch.uint8, device="cpu")
    return quantized, torch.empty(blocks_of(numel), dtype=torch.float32, device="cpu")


def decode(
    quantized: Tensor, scale_inv: Tensor, fmt: Format, out: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """quantized uint8 [n], scale_inv fp32 [ceil(n / 128)] -> [n] of `dtype`, or into `out`, whose dtype decides."""
    target = _target(quantized.numel(), out, dtype)
    decode_into(quantized.contiguous(), scale_inv.contiguous(), fmt.name, target, per_block=True)
    return _deliver(target, out, dtype)


def sum_contributions(
    quantized: Tensor,
    scale_inv: Tensor,
    fmt: Format,
    factor: float = 1.0,
    out: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """quantized [W, n], scale_inv [W, blocks] (rows may be strided) -> fp32 [n] or `out`: factor * sum in rank order.

    own  [n], fp32, bf16 or fp16: a contribution that was never cast, the first of the sum; may be `out` itself
    """
    target = _target(quantized.shape[1], out, torch.float32)
    _sum(quantized, scale_inv, fmt, factor, own, target, None, fmt, False)
    return _deliver(target, out, torch.float32)


def sum_and_encode(
    quantized: Tensor,
    scale_inv: Tensor,
    fmt: Format,
    factor: float = 1.0,
    out_fmt: Format | None = None,
    own: Tensor | None = None,
    best_of_two: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`encode(sum_contributions(...), out_fmt or fmt)` in one pass: no fp32 sum in memory."""
    out = out or _new_quantized(quantized.shape[1])
    _sum(quantized, scale_inv, fmt, factor, own, None, out, out_fmt or fmt, best_of_two)
    return out


def _sum(
    quantized: Tensor,
    scale_inv: Tensor,
    fmt: Format,
    factor: float,
    own: Tensor | None,
    out: Tensor | None,
    quantized_out: tuple[Tensor, Tensor] | None,
    out_fmt: Format,
    best_of_two: bool,
) -> None:
    contributions, numel = quantized.shape
    quantized = quantized if quantized.stride(1) == 1 or numel <= 1 else quantized.contiguous()
    scale_inv = scale_inv if scale_inv.stride(1) == 1 or scale_inv.shape[1] <= 1 else scale_inv.contiguous()
    own = None if own is None else readable(own.detach())
    made, made_scale_inv = quantized_out or (None, None)
    job = jobs.FlatSumJob(
        jobs.address(own), quantized.data_ptr(), scale_inv.data_ptr(), jobs.address(out), jobs.address(made),
        jobs.address(made_scale_inv), quantized.stride(0), scale_inv.stride(0), numel, contributions,
        jobs.DTYPES[out.dtype] if out is not None else 0, jobs.FORMATS[fmt.name], factor, jobs.FORMATS[out_fmt.name],
        jobs.DTYPES[own.dtype] if own is not None else 0, best_of_two,
    )  # fmt: skip
    run(jobs.FLAT_SUM, job, blocks_of(numel))


def _target(numel: int, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the kernel writes: `out` itself where it can."""
    if out is not None and out.is_contiguous() and out.dtype in jobs.DTYPES:
        return out
    wanted = out.dtype if out is not None else dtype
    return torch.empty(numel, dtype=wanted if wanted in jobs.DTYPES else torch.float32, device="cpu")


def _deliver(target: Tensor, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    if out is None:
        return target.to(dtype)
    return out if target is out else out.copy_(target.view_as(out))
