"""Casts and rows of stacked experts, whatever the device: one Triton launch for all of them on a GPU, else PyTorch.

Names and arguments are those of `numerics.row_scales`, and so are the bits.
"""

from __future__ import annotations

from typing import Any

import torch

from ..formats import Format
from ..numerics import row_scales
from ..numerics.dtypes import torch_dtype
from ..numerics.scaling import scale_from_amax
from .dispatch import amax_many, library_for, quantize_many

Quantized = tuple[torch.Tensor, torch.Tensor]
"""Quantized values and scale_inv."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take."""


def quantize_rows(x: torch.Tensor, fmt: Format) -> Quantized:
    """See numerics.row_scales: one scale for each row."""
    return _casts(x, whole_rows=True).quantize_rows(x, fmt)


def quantize_rows_measured(x: torch.Tensor, fmt: Format, table: torch.Tensor | None) -> tuple[Quantized, torch.Tensor]:
    """See numerics.row_scales: one scale for each row, and the amaxes of columns beside."""
    return _casts(x, whole_rows=True).quantize_rows_measured(x, fmt, table)


def quantize_experts(x: torch.Tensor, fmt: Format) -> Quantized:
    """x [experts, R, C] -> quantized values of its shape and scale_inv [experts]: each with the scale of its amax, to
    the bits that `owner` makes at O3.
    """
    quantized = torch.empty(x.shape, dtype=torch_dtype(fmt), device=x.device)
    scale = scale_from_amax(amax_many(list(x.unbind())), fmt)
    quantize_many([one.reshape(-1) for one in x], scale, fmt, [one.view(-1) for one in quantized.view(torch.uint8)])
    return quantized, torch.reciprocal(scale)


def column_amaxes(x: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    """See numerics.row_scales: fp32 [experts, columns]."""
    return _casts(x).column_amaxes(x, table)


def quantize_columns(
    x: torch.Tensor, amax: torch.Tensor, fmt: Format, table: torch.Tensor | None, room: int
) -> Quantized:
    """See numerics.row_scales: one scale for each column of each expert, values transposed."""
    return _casts(x).quantize_columns(x, amax, fmt, table, room)


def zero_tail(out: torch.Tensor, end: torch.Tensor) -> None:
    """See numerics.row_scales: zeros in the rows behind the last expert's."""
    _module("expert_rows", out).zero_tail(out, end)


def zero_experts(out: torch.Tensor, ends: torch.Tensor) -> None:
    """See numerics.row_scales: zeros in the matrices of experts without rows."""
    _module("expert_rows", out).zero_experts(out, ends)


def add_rows(x: torch.Tensor, bias: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """See numerics.row_scales: the bias of each row's expert."""
    return _module("expert_rows", x).add_rows(x, bias, table)


def sum_rows(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """See numerics.row_scales: fp32 sums of each expert's rows, in an order of the device's own."""
    return _module("expert_rows", x).sum_rows(x, table)


def _casts(x: torch.Tensor, *, whole_rows: bool = False) -> Any:
    """What casts this tensor: the module of kernels, or the reference."""
    found = _module("grouped", x)
    return row_scales if whole_rows and found is not row_scales and x.shape[-1] > found.WIDEST else found


def _module(name: str, x: torch.Tensor) -> Any:
    """The kernels of this name where they take the tensor, else the reference."""
    found = getattr(library_for(x.device), name, None)
    return row_scales if found is None or not x.is_contiguous() or x.dtype not in FLOATS else found
