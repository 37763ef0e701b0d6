"""`rowwise`: a current scale for each row of an operand, along the axis that the product sums over.

    fprop   input per token, weight per output             [M, 1] and [1, N]
    dgrad   grad_output per token, weight per input        [M, 1] and [1, K]
    wgrad   grad_output per output, input per input        [N, 1] and [1, K]

A row that is small beside others keeps its precision, as with blocks, but the scales are applied once to each sum, so
that they need not be powers of two. The price: no data serve two products. Each operand is cast for each of its
products from high precision, a weight too. On a GPU one read casts the rows and measures the columns, another casts the
columns (`kernels.grouped`, as one expert).

On Hopper and later `torch._scaled_mm` multiplies by rows, for bf16 results; other results, other devices and CPUs
decode and multiply in fp32: exact in the operands.
Source: torch._scaled_mm; torchao's float8 recipe `rowwise`, which takes e4m3 for all operands (`fp8_format` E4M3).
"""

from __future__ import annotations

from typing import Any

import torch

from ...formats import Format
from ...kernels import grouped as casts
from ..layer_state import Call
from ..operands import ROWS, Operand, QuantizedPair
from .base import Scaling

STEP = 16
"""Rows and columns of every operand, in elements: what `torch._scaled_mm` takes without padding."""


QuantizedRows = tuple[torch.Tensor, torch.Tensor] | None
"""Quantized values [rows, columns] and scale_inv [rows, 1]."""


class RowwiseScaling(Scaling):
    input_extent = ROWS
    weight_extent = ROWS
    transposes = False
    weight_transposes = False
    carries_weight = False
    fast_dtypes = (torch.bfloat16,)
    te_quantized = None

    def quantize(self, x: torch.Tensor, call: Call, column: int) -> Operand:
        return Operand(*casts.quantize_rows(x, call.format_of(column)), ROWS)

    def quantize_transposed(self, x: torch.Tensor, call: Call, column: int) -> Operand:
        return _columns(x, call.format_of(column))

    def requantize_weight(
        self, weight: torch.Tensor, scale: tuple[torch.Tensor, torch.Tensor] | None, fmt: Format
    ) -> Operand:
        return Operand(*casts.quantize_rows(weight.detach(), fmt), ROWS)

    def quantize_weight_transposed(self, weight: torch.Tensor, fmt: Format) -> Operand:
        return _columns(weight.detach(), fmt)

    def fast_rows(self, weight: torch.Tensor) -> int:
        if torch.cuda.get_device_capability(weight.device)[0] < 9 or weight.dtype != torch.bfloat16:
            return 0
        return 0 if any(size % STEP for size in weight.shape) else STEP

    def quantize_on_cuda(
        self,
        library: Any,
        x: torch.Tensor,
        call: Call,
        column: int,
        *,
        straight: bool,
        transposed: bool,
        guarded: bool,
        kept: torch.Tensor | None = None,
    ) -> QuantizedPair:
        # A row that is not finite has a scale_inv of NaN by itself: nothing is to be guarded.
        rows, columns = _both(x.view(-1, x.shape[-1]), call.format_of(column), straight, transposed)
        return (None, None) if rows is None else rows, (None, None) if columns is None else columns

    def quantize_weight_on_cuda(
        self, library: Any, weight: torch.Tensor, call: Call, *, straight: bool, transposed: bool,
        kept: torch.Tensor | None = None,
    ) -> Operand:  # fmt: skip
        # What is kept for other micro-batches must serve their backwards too: columns cannot be made of rows.
        transposed = transposed or call.may_cache(weight)
        rows, columns = _both(weight, call.recipe.forward_format, straight, transposed)
        back = None if columns is None else Operand(*columns, ROWS)
        data, scale_inv = (None, None) if rows is None else rows
        return Operand(data, scale_inv, ROWS, transposed=back)  # type: ignore[arg-type]  # without `straight`

    def carried_scale_shape(self, k: Any, rows: Any) -> tuple[Any, ...]:
        return (k,)


def _both(x: torch.Tensor, fmt: Format, straight: bool, transposed: bool) -> tuple[QuantizedRows, QuantizedRows]:
    """Contiguous `x` [R, C] by its rows, and transposed by its columns; None for what is not asked for."""
    if not transposed:
        quantized, scale_inv = casts.quantize_rows(x, fmt)
        return (quantized, scale_inv.unsqueeze(1)), None
    rows, stacked = None, x.unsqueeze(0)
    if straight:
        (quantized, scale_inv), amax = casts.quantize_rows_measured(stacked, fmt, None)
        rows = quantized[0], scale_inv.view(-1, 1)
    else:
        amax = casts.column_amaxes(stacked, None)
    quantized, scale_inv = casts.quantize_columns(stacked, amax, fmt, None, 0)
    return rows, (quantized[0], scale_inv.view(-1, 1))


def _columns(x: torch.Tensor, fmt: Format) -> Operand:
    """`x` [R, C] as [C, R] with a scale for each column."""
    if not x.shape[0]:
        return Operand(*casts.quantize_rows(x.t(), fmt), ROWS)
    _, columns = _both(x, fmt, False, True)
    assert columns is not None
    return Operand(columns[0], columns[1].view(-1), ROWS)


SCALING = RowwiseScaling()
