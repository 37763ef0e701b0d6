"""`delayed`: one scale per tensor, known beforehand from the amaxes of earlier steps (`scales.py`).

One pass casts and measures. A tensor without history is cast as under `current`, with its own amax, until a step has
seen one. The scales of all layers and their histories lie in the FP8 state, which an engine's step renews.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...formats import Format
from ...kernels import amax as amax_of
from ...kernels import library_for, quantize, quantize_with_amax
from ...numerics.scaling import scale_inv_of
from ..layer_state import Call
from ..operands import TENSOR, Operand, QuantizedPair, is_given, with_overflow_shown
from .base import Scaling
from .current import CurrentScaling, both


class DelayedScaling(CurrentScaling):
    te_class = "DelayedScaling"

    def quantize(self, x: torch.Tensor, call: Call, column: int) -> Operand:
        fmt = call.format_of(column)
        if not call.knows(column):
            amax = amax_of(x)
            if call.records:
                call.record(column, amax)
            return _without_history(x, call, column, fmt, amax)
        scale, scale_inv = call.scale(column)
        if not call.records:
            return Operand(quantize(x, scale, fmt), scale_inv, TENSOR, scale)
        quantized, amax = quantize_with_amax(x, scale, fmt)
        call.record(column, amax)
        return Operand(quantized, scale_inv, TENSOR, scale, amax)

    def quantize_weight(self, weight: torch.Tensor, call: Call) -> Operand:
        column, values = call.layer_state.weight_column, weight.detach()
        fmt, exact = call.format_of(column), call.layer_state.fp8_state.exact
        if is_given(weight, call.layer_state) and not exact:
            return _without_history(values, call, column, fmt, amax_of(values))
        if exact or not call.knows(column):
            return self.quantize(values, call, column)
        assert call.scales is not None
        if values.device.type != "cpu":  # measured first: whether it has outgrown its scale is for the device to say
            amax = amax_of(values)
            if call.records:
                call.record(column, amax)
            scale = call.scales.of_weight(column, amax, fmt)
            return Operand(quantize(values, scale, fmt), scale_inv_of(scale), TENSOR, scale, amax)
        cast = self.quantize(values, call, column)
        amax = amax_of(values) if cast.amax is None else cast.amax
        scale = call.scales.of_weight(column, amax, fmt)
        if scale is cast.scale:
            return cast
        return Operand(quantize(values, scale, fmt), scale_inv_of(scale), TENSOR, scale, amax)

    def requantize_weight(
        self, weight: torch.Tensor, scale: tuple[torch.Tensor, torch.Tensor] | None, fmt: Format
    ) -> Operand:
        if scale is None:
            return super().requantize_weight(weight, None, fmt)
        return Operand(quantize(weight.detach(), scale[0], fmt), scale[1], TENSOR, scale[0])

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
        fmt = call.format_of(column)
        if not call.knows(column):
            (quantized, back), scale_inv, shown = _unknown_on_cuda(
                library, x, call, column, fmt, straight, transposed, kept
            )
            shown = with_overflow_shown(scale_inv, shown) if guarded else scale_inv
        else:
            scales, pending = call.scales, call.raised(column)
            assert scales is not None
            measured = pending is not None
            quantized, back = library.operands.cast_delayed(
                x, scales.frozen, column, fmt, pending, straight=straight, transposed=transposed,
                guarded=guarded and measured, kept=kept,
            )  # fmt: skip
            scale_inv = shown = scales.scale_inv[column]
            if guarded:  # an older infinity has made the same step NaN anyway
                shown = scales.shown[column] if measured else with_overflow_shown(scale_inv, library.amax(x))
        return (quantized, scale_inv if transposed else shown), (back, shown) if transposed else (None, None)

    def quantize_weight_on_cuda(
        self, library: Any, weight: torch.Tensor, call: Call, *, straight: bool, transposed: bool,
        kept: torch.Tensor | None = None,
    ) -> Operand:  # fmt: skip
        column, scales = call.layer_state.weight_column, call.scales
        assert scales is not None
        pending, fmt = call.raised(column) if straight else None, call.format_of(column)
        if call.layer_state.fp8_state.exact:
            quantized, back = library.operands.cast_delayed(
                weight, scales.frozen, column, fmt, pending, straight=straight, transposed=transposed, kept=kept
            )
            scale_inv = scales.scale_inv[column]
        else:
            scale_inv = torch.empty((), dtype=torch.float32, device=weight.device) if kept is None else kept.view(())
            quantized, back = library.weights.cast_weight(
                weight,
                scales.frozen,
                column,
                fmt,
                pending,
                scales.own,
                scale_inv,
                margin=scales.margin,
                straight=straight,
                transposed=transposed,
            )
        return Operand(quantized, scale_inv, TENSOR, transposed=None if back is None else Operand(back, scale_inv))

    def quantize_both_on_cuda(
        self, library: Any, x: torch.Tensor, weight: torch.Tensor, call: Call, *, transposed: tuple[bool, bool],
        kept: Sequence[torch.Tensor | None] = (None, None),
    ) -> tuple[QuantizedPair, Operand]:  # fmt: skip
        layer_state, scales = call.layer_state, call.scales
        columns = layer_state.input_column, layer_state.weight_column
        if x.dtype != weight.dtype or layer_state.fp8_state.exact or not all(map(call.knows, columns)):
            return Scaling.quantize_both_on_cuda(self, library, x, weight, call, transposed=transposed, kept=kept)
        assert scales is not None
        kept_input, scale_inv = kept
        if scale_inv is None:
            scale_inv = torch.empty((), dtype=torch.float32, device=weight.device)
        made = library.pairs.cast_delayed(
            x,
            weight,
            scales.frozen,
            columns,
            call.format_of(columns[0]),
            call.raised(columns[0]),
            scales.own,
            scale_inv,
            margin=scales.margin,
            transposed=transposed,
            kept=kept_input,
        )
        return both(made, scales.scale_inv[columns[0]], scale_inv.view(()))

    def weight_scale(self, weight: torch.Tensor, call: Call) -> torch.Tensor:
        column, fmt, scales = (
            call.layer_state.weight_column,
            call.format_of(call.layer_state.weight_column),
            call.scales,
        )
        assert scales is not None
        library = library_for(weight.device) if weight.is_cuda and weight.is_contiguous() else None
        if library is None:
            return scales.of_weight(column, amax_of(weight), fmt).reshape(1)
        scale: torch.Tensor = library.weights.weight_scale(
            weight, scales.frozen, column, fmt, scales.own, margin=scales.margin
        )
        return scale

    def owner_scales(
        self, weights: Sequence[Any], amaxes: Sequence[torch.Tensor], fp8_state: Any
    ) -> list[torch.Tensor]:
        # The step's amaxes are in the histories already: these are the scales that the layers would cast with next.
        each = [amax.view(()) for amax in amaxes]
        for weight, amax in zip(weights, each, strict=True):
            fp8_state.record_weight_amax(weight.layer, amax)
        scales: list[torch.Tensor] = fp8_state.weight_scales([weight.layer for weight in weights], each)
        return scales

    def te_arguments(self, formats: Any, recipe: Any) -> dict[str, Any]:
        # The histories are the FP8 state's: Transformer Engine's own is one entry long, the slot where a cast leaves
        # its amax.
        return super().te_arguments(formats, recipe) | {"amax_history_len": 1, "reduce_amax": False}


def _without_history(x: torch.Tensor, call: Call, column: int, fmt: Format, amax: torch.Tensor) -> Operand:
    assert call.scales is not None
    scale = call.scales.of_tensor(column, amax, fmt, given=call.knows(column))
    return Operand(quantize(x, scale, fmt), scale_inv_of(scale), TENSOR, scale, amax)


def _unknown_on_cuda(
    library: Any,
    x: torch.Tensor,
    call: Call,
    column: int,
    fmt: Format,
    straight: bool,
    transposed: bool,
    kept: torch.Tensor | None,
) -> tuple[tuple[torch.Tensor | None, torch.Tensor | None], torch.Tensor, torch.Tensor]:
    """((data, transposed data), scale_inv, amax) of a tensor without history: two passes, for some steps only."""
    amax = library.amax(x)
    assert call.scales is not None
    scale = call.scales.of_tensor(column, amax, fmt)
    if call.records:
        call.record(column, amax)
    frozen = torch.stack([scale_inv_of(scale), scale, scale, scale]).unsqueeze(0)  # scales of one column
    casts = library.operands
    cast = casts.cast_delayed(x, frozen, 0, fmt, None, straight=straight, transposed=transposed, kept=kept)
    return cast, frozen[0, 0], amax


SCALING = DelayedScaling()
