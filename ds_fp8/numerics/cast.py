"""One scale for a tensor: the FP8 cast, there and back, and the amax that decides it.

    quantized  = RNE(clamp(float32(x) * scale, -format.max, format.max))
    x back = float32(quantized) * scale_inv, then rounded to the wanted dtype

RNE is round to nearest, ties to even. A cast must not decide whether a tensor is finite: torch 2.13 on CPU turns an
infinity into 448 in e4m3, an H200 turns it into NaN (tests/numerics/test_cast.py holds all 256 codes of both formats).
So we clamp explicitly, infinity saturates, NaN stays NaN, and whoever needs to know asks `amax`.
Source: FP8 formats for deep learning (arXiv 2209.05433), section 3.
"""

from __future__ import annotations

import torch

from ..formats import Format
from .dtypes import torch_dtype


def saturate(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """`x` (fp32, any shape) rounded to quantized values of `fmt`: infinities become the largest finite value, NaN stays
    NaN.
    """
    return x.clamp(-fmt.max, fmt.max).to(torch_dtype(fmt))


def divide(x: torch.Tensor, by: float) -> torch.Tensor:
    """One IEEE division. torch on CUDA multiplies by the reciprocal when the divisor is a Python number."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


def quantize(x: torch.Tensor, scale: torch.Tensor | float, fmt: Format) -> torch.Tensor:
    """Quantized values of `x` (any float dtype and shape) under one fp32 scale; same shape, float8.

    Operations, each rounded to fp32: product, clamp, cast. `scale` is a 0-d or 1-element fp32 tensor, or a float.
    """
    return saturate(x.float() * scale, fmt)


def dequantize(
    quantized: torch.Tensor, scale_inv: torch.Tensor | float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`quantized` (float8, any shape) times one fp32 `scale_inv`, rounded to fp32 and then to `dtype`."""
    return (quantized.float() * scale_inv).to(dtype)


def amax(x: torch.Tensor) -> torch.Tensor:
    """Largest |x| as a 0-d fp32 tensor on x's device; 0 if `x` is empty; NaN and infinity both come back as infinity.

    NCCL's MAX ignores NaN, so a NaN amax would vanish in a reduction over ranks: it is carried as infinity.
    """
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(x.detach())
    largest = torch.maximum(high.float(), -low.float())
    return torch.where(torch.isfinite(largest), largest, torch.full_like(largest, torch.inf))
