"""`rowwise`: a current scale for each row of an operand, along the axis that the product sums over.

    fprop   input per token, weight per output             [M, 1] and [1, N]
    dgrad   grad_output per token, weight per input        [M, 1] and [1, K]
    wgrad   grad_output per output, input per input        [N, 1] and [1, K]

A row that is small beside others keeps its precision, as with blocks, but the scales are applied once to each sum, so
that they need not be powers of two. The price: no data serve two products. Each operand is cast for each of its
products from high precision, a weight too: dgrad casts it again in the backward.

On Hopper and later `torch._scaled_mm` multiplies by rows, for bf16 results; other results, other devices and CPUs
decode and multiply in fp32: exact in the operands. Not yet run on a GPU.
Source: torch._scaled_mm; torchao's float8 recipe `rowwise`, which takes e4m3 for all operands (`fp8_format` E4M3).
"""

from __future__ import annotations

from typing import Any

import torch

from ...formats import Format
from ...numerics.row_scales import quantize_rows
from ..layer_state import Call
from ..operands import ROWS, Operand
from .base import Scaling


class RowwiseScaling(Scaling):
    input_extent = ROWS
    weight_extent = ROWS
    transposes = False
    weight_transposes = False
    carries_weight = False
    te_quantized = None

    def quantize(self, x: torch.Tensor, call: Call, column: int) -> Operand:
        return Operand(*quantize_rows(x, call.format_of(column)), ROWS)

    def quantize_transposed(self, x: torch.Tensor, call: Call, column: int) -> Operand:
        return Operand(*quantize_rows(x.t(), call.format_of(column)), ROWS)

    def requantize_weight(
        self, weight: torch.Tensor, scale: tuple[torch.Tensor, torch.Tensor] | None, fmt: Format
    ) -> Operand:
        return Operand(*quantize_rows(weight, fmt), ROWS)

    def quantize_weight_transposed(self, weight: torch.Tensor, fmt: Format) -> Operand:
        return Operand(*quantize_rows(weight.t(), fmt), ROWS)

    def carried_scale_shape(self, k: Any, rows: Any) -> tuple[Any, ...]:
        return (k,)


SCALING = RowwiseScaling()
