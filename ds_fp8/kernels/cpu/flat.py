"""Flat partitions on CPU: codes (uint8) and one fp32 scale_inv per 128 elements; the twin of `numerics/flat.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Format
from ...numerics.random_bits import Stochastic
from . import jobs
from .casts import blocks_of, decode_into, readable, run


def encode(x: Tensor, fmt: Format, rounding: Stochastic | None = None) -> tuple[Tensor, Tensor]:
    """x [n], fp32, bf16 or fp16 -> codes uint8 [n], scale_inv fp32 [ceil(n / 128)]; one pass over x."""
    x = readable(x.detach())
    codes = torch.empty(x.numel(), dtype=torch.uint8)
    scale_inv = torch.empty(blocks_of(x.numel()), dtype=torch.float32)
    encode_into(x, fmt, codes, scale_inv, rounding=rounding)
    return codes, scale_inv


def encode_into(
    x: Tensor, fmt: Format, codes: Tensor, scale_inv: Tensor, *, rounding: Stochastic | None = None
) -> None:
    """The same into the caller's contiguous buffers, say a message that is about to be sent."""
    job = jobs.FlatEncodeJob(
        x.data_ptr(), codes.data_ptr(), scale_inv.data_ptr(), x.numel(), jobs.DTYPES[x.dtype],
        jobs.FORMATS[fmt.name], rounding is not None, rounding.key if rounding else 0,
        rounding.first & 0xFFFFFFFF if rounding else 0, 0,
    )  # fmt: skip
    run(jobs.FLAT_ENCODE, job, blocks_of(x.numel()))


def decode(
    codes: Tensor, scale_inv: Tensor, fmt: Format, out: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """codes uint8 [n], scale_inv fp32 [ceil(n / 128)] -> [n] of `dtype`, or into `out`, whose dtype decides."""
    target = _target(codes.numel(), out, dtype)
    decode_into(codes.contiguous(), scale_inv.contiguous(), fmt.name, target, per_block=True)
    return _deliver(target, out, dtype)


def sum_contributions(
    codes: Tensor, scale_inv: Tensor, fmt: Format, factor: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """codes [W, n], scale_inv [W, blocks] (rows may be strided) -> fp32 [n] or `out`: factor * sum in rank order."""
    target = _target(codes.shape[1], out, torch.float32)
    _sum(codes, scale_inv, fmt, factor, target, None, None, fmt)
    return _deliver(target, out, torch.float32)


def sum_and_encode(
    codes: Tensor, scale_inv: Tensor, fmt: Format, factor: float = 1.0, out_fmt: Format | None = None
) -> tuple[Tensor, Tensor]:
    """`encode(sum_contributions(...), out_fmt or fmt)` in one pass: no fp32 sum in memory."""
    out_codes = torch.empty(codes.shape[1], dtype=torch.uint8)
    out_scale_inv = torch.empty(blocks_of(codes.shape[1]), dtype=torch.float32)
    _sum(codes, scale_inv, fmt, factor, None, out_codes, out_scale_inv, out_fmt or fmt)
    return out_codes, out_scale_inv


def _sum(
    codes: Tensor,
    scale_inv: Tensor,
    fmt: Format,
    factor: float,
    out: Tensor | None,
    out_codes: Tensor | None,
    out_scale_inv: Tensor | None,
    out_fmt: Format,
) -> None:
    contributions, numel = codes.shape
    codes = codes if codes.stride(1) == 1 or numel <= 1 else codes.contiguous()
    scale_inv = scale_inv if scale_inv.stride(1) == 1 or scale_inv.shape[1] <= 1 else scale_inv.contiguous()
    job = jobs.FlatSumJob(
        codes.data_ptr(), scale_inv.data_ptr(), jobs.address(out), jobs.address(out_codes),
        jobs.address(out_scale_inv), codes.stride(0), scale_inv.stride(0), numel, contributions,
        jobs.DTYPES[out.dtype] if out is not None else 0, jobs.FORMATS[fmt.name], factor, jobs.FORMATS[out_fmt.name],
    )  # fmt: skip
    run(jobs.FLAT_SUM, job, blocks_of(numel))


def _target(numel: int, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the kernel writes: `out` itself where it can."""
    if out is not None and out.is_contiguous() and out.dtype in jobs.DTYPES:
        return out
    wanted = out.dtype if out is not None else dtype
    return torch.empty(numel, dtype=wanted if wanted in jobs.DTYPES else torch.float32)


def _deliver(target: Tensor, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    if out is None:
        return target.to(dtype)
    return out if target is out else out.copy_(target.view_as(out))
