"""`current`: one scale per tensor, from its own amax. Two passes over the tensor, and nothing to remember."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...formats import E4M3, Format
from ...kernels import amax as amax_of
from ...kernels import quantize
from ...numerics.gemm_blocks import block_scale
from ...numerics.scaling import scale_from_amax, scale_inv_of
from ..layer_state import Call, QuantizedWeight
from ..operands import TENSOR, Operand, QuantizedPair
from .base import Scaling
from .owner import Segment, measure_tensors, quantize_tensors

STEP = 16
"""Rows and columns of every operand, in elements: what `torch._scaled_mm` takes without padding."""


class CurrentScaling(Scaling):
    te_class = "Float8CurrentScaling"

    def quantize(self, x: torch.Tensor, call: Call, column: int) -> Operand:
        return _quantize(x, call.format_of(column))

    def requantize_weight(
        self, weight: torch.Tensor, scale: tuple[torch.Tensor, torch.Tensor] | None, fmt: Format
    ) -> Operand:
        return _quantize(weight.detach(), fmt)

    def fast_rows(self, weight: torch.Tensor) -> int:
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
        (quantized, back), scale_inv, shown = library.operands.cast_current(
            x, call.format_of(column), straight=straight, transposed=transposed, guarded=guarded, kept=kept
        )
        return (quantized, scale_inv if transposed else shown), (back, shown) if transposed else (None, None)

    def quantize_weight_on_cuda(
        self, library: Any, weight: torch.Tensor, call: Call, *, straight: bool, transposed: bool,
        kept: torch.Tensor | None = None,
    ) -> Operand:  # fmt: skip
        (quantized, back), scale_inv, _ = library.operands.cast_current(
            weight, call.recipe.forward_format, straight=straight, transposed=transposed, kept=kept
        )
        scale_inv = scale_inv.view(())
        return Operand(quantized, scale_inv, TENSOR, transposed=None if back is None else Operand(back, scale_inv))

    def quantize_both_on_cuda(
        self, library: Any, x: torch.Tensor, weight: torch.Tensor, call: Call, *, transposed: tuple[bool, bool],
        kept: Sequence[torch.Tensor | None] = (None, None),
    ) -> tuple[QuantizedPair, Operand]:  # fmt: skip
        if x.dtype != weight.dtype:
            return Scaling.quantize_both_on_cuda(self, library, x, weight, call, transposed=transposed, kept=kept)
        made, scale_inv = library.pairs.cast_current(
            x, weight, call.recipe.forward_format, transposed=transposed, kept=(kept[0], kept[1])
        )
        return both(made, scale_inv[0], scale_inv[1].view(()))

    def owner_measure(self, segments: Sequence[Segment], owners: Sequence[int], amaxes: torch.Tensor,
                      per_weight: Sequence[torch.Tensor]) -> None:  # fmt: skip
        measure_tensors(segments, owners, amaxes)

    def owner_scales(
        self, weights: Sequence[Any], amaxes: Sequence[torch.Tensor], fp8_state: Any
    ) -> list[torch.Tensor]:
        return [scale_from_amax(amax.view(()), E4M3) for amax in amaxes]

    def owner_quantize(self, segments: Sequence[Segment], scales: Sequence[torch.Tensor]) -> None:
        quantize_tensors(segments, scales)

    def frozen_scales(self, amaxes: torch.Tensor, shape: tuple[int, int], fmt: Format) -> torch.Tensor:
        return block_scale(amaxes.view(()), fmt, power_of_two=True)

    def quantize_frozen(self, weight: torch.Tensor, fmt: Format) -> QuantizedWeight:
        scale = self.frozen_scales(amax_of(weight), (weight.shape[0], weight.shape[1]), fmt)
        return QuantizedWeight(quantize(weight, scale, fmt), scale_inv_of(scale))

    def te_quantized_arguments(self, data: torch.Tensor, scale_inv: torch.Tensor, quantizer: Any) -> dict[str, Any]:
        # To the data's device: before its first call the FP8 state of a model without an engine lies on the CPU, and
        # cuBLASLt would take a host address.
        return {"data": data, "fp8_scale_inv": scale_inv.reshape(1).to(data.device), "data_transpose": None}


def both(
    made: Sequence[tuple[torch.Tensor, torch.Tensor | None]], scale_inv: torch.Tensor, weight_scale_inv: torch.Tensor
) -> tuple[QuantizedPair, Operand]:
    """What `quantize_both_on_cuda` returns, of quantized values both ways round and a scale_inv each."""
    (quantized, back), (weight, weight_back) = made
    pair = (quantized, scale_inv), (None, None) if back is None else (back, scale_inv)
    transposed = None if weight_back is None else Operand(weight_back, weight_scale_inv)
    return pair, Operand(weight, weight_scale_inv, TENSOR, transposed=transposed)


def _quantize(x: torch.Tensor, fmt: Format) -> Operand:
    amax = amax_of(x)
    scale = scale_from_amax(amax, fmt)
    return Operand(quantize(x, scale, fmt), scale_inv_of(scale), amax=amax)


SCALING = CurrentScaling()
