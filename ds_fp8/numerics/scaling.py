"""Scales from amax: the single place where a float range becomes an FP8 range.

    scale = (format.max / amax) / 2 ** margin        so that amax * scale fills the range, less `margin` powers of two

Three rules for the odd cases, Transformer Engine's: an amax of zero, and one that is not finite, keep the previous
scale; an amax so small that the scale would overflow gives the largest finite fp32 instead (an infinite scale would
turn zeros into NaN).
Source: Transformer Engine 2.20, delayed scaling; FP8-LM (arXiv 2310.18313), section 2.
"""

from __future__ import annotations

import torch

from ..formats import FP32, Format
from .dtypes import as_tensor


def scale_from_amax(
    amax: torch.Tensor | float, fmt: Format, *, margin: int = 0, previous: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """The scale for `amax`, elementwise: any shape, fp32; `previous` (broadcast) where amax is zero or not finite.

    Operations in fp32: quotient fmt.max / amax, quotient by 2 ** margin, then the choices.
    """
    amax = as_tensor(amax).float()
    previous = torch.as_tensor(previous, dtype=torch.float32, device=amax.device)
    scale = torch.full_like(amax, fmt.max) / amax / 2.0**margin
    scale = torch.where(torch.isinf(scale), torch.full_like(scale, FP32.max), scale)
    return torch.where((amax > 0) & torch.isfinite(amax), scale, previous)


def scale_inv_of(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, one IEEE division."""
    return torch.reciprocal(scale)
