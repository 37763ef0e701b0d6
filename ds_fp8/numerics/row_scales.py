"""One scale for each row of an operand: what grouped products take, because it is known without looking at other rows.

    scale = format.max / amax of the row        0: 1;  an infinite scale: the largest finite fp32
    code  = RNE(clamp(x * scale))

A row holds one token, or one output of one expert, so no scale depends on how many tokens an expert was sent, nor on
what its neighbours look like. A row that holds inf or NaN gets scale_inv NaN: an overflow stays visible.
Source: torch._scaled_grouped_mm's row-wise scales; torchao's training of mixtures in float8.
"""

from __future__ import annotations

import torch

from ..formats import Format
from .cast import saturate
from .scaling import scale_from_amax


def quantize_rows(x: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantized values of `x` [..., rows, columns] (any float dtype), contiguous, and scale_inv [..., rows] fp32."""
    values = x.detach().float()
    amax = values.abs().amax(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])
    scale, scale_inv = _scales(amax, fmt)
    return saturate(values * scale.unsqueeze(-1), fmt).contiguous(), scale_inv


def quantize_columns(
    x: torch.Tensor, owner: torch.Tensor, groups: int, fmt: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for each column of each group of rows: quantized [rows, columns] and scale_inv [groups, columns] fp32.

    owner  [rows] int64, the group of a row; rows of group `groups` belong to none, and their quantized values mean
           nothing
    """
    values = x.detach().float()
    places = owner.unsqueeze(1).expand_as(values)
    amax = values.new_zeros(groups + 1, x.shape[1]).scatter_reduce_(0, places, values.abs(), "amax")
    scale, scale_inv = _scales(amax, fmt)
    return saturate(values * scale[owner], fmt), scale_inv[:groups]


def _scales(amax: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    scale = scale_from_amax(amax, fmt)
    scale_inv = torch.reciprocal(scale)
    return scale, torch.where(torch.isfinite(amax), scale_inv, torch.full_like(scale_inv, torch.nan))
