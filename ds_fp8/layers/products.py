"""The three products of a linear layer, as one autograd function.

    fprop   output      [M, N] = input       [M, K] @ weight.T [K, N]     e4m3 x e4m3
    dgrad   grad_input  [M, K] = grad_output [M, N] @ weight   [N, K]     e5m2 x e4m3   (HYBRID; e4m3 x e4m3 with E4M3)
    wgrad   grad_weight [N, K] = grad_output.T [N, M] @ input  [M, K]     e5m2 x e4m3   (HYBRID)

What is kept for the backward is the quantized values: one byte per element of the input instead of two or four. A
product that is overridden to high precision keeps, and uses, the operands as they came. The gradient of the bias is the
sum of grad_output in high precision.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import LayerError
from .batched_gradients import one_by_one
from .gemm import inside, matmul, multiplies_fp8
from .layer_state import Call, LayerFp8State
from .operands import (
    ROWS,
    TENSOR,
    Operand,
    amax_of,
    cast_transposed,
    cast_weight,
    given_weight,
    is_sharded,
    measure,
    parameter_of,
    weight_again,
    with_overflow_shown,
)


class LinearProducts(torch.autograd.Function):
    """output = input @ weight.T + bias with FP8 operands.

    input   [..., K] in the compute dtype, contiguous
    weight  [N, K] in its own dtype: quantized values are made from it directly
    bias    [N] or None
    call    scales, and what to do with them
    grad    whether a backward may follow (inside `forward` autograd is always off)

    Axes are folded in here, and what is returned is no view: nobody may write into a view that was made in here.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: Call, grad: bool
    ) -> torch.Tensor:
        needs = ctx.needs_input_grad
        output, kept = forward_products(
            input.view(-1, input.shape[-1]), weight, bias, call, dgrad=grad and needs[0], wgrad=grad and needs[1]
        )
        # Not where it may be released: see `split_released`.
        ctx.released = kept.pop("weight", None) if call.quantized_weight is not None else None
        ctx.save_for_backward(*kept.values())
        ctx.names, ctx.call, ctx.dtype = tuple(kept), call, input.dtype
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return as_shape(output, (*input.shape[:-1], output.shape[1]))

    @staticmethod
    @one_by_one
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        call: Call = ctx.call
        refuse_second_derivative(call.layer_state)
        kept = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        if ctx.released is not None:
            kept["weight"] = ctx.released
        rows = grad_output.to(ctx.dtype).contiguous().view(-1, grad_output.shape[-1])
        with torch.autocast(rows.device.type, enabled=False):
            grad_input, grad_weight, grad_bias = backward_products(
                rows,
                kept,
                call,
                needs=ctx.needs_input_grad[:3],
                weight_dtype=ctx.weight_dtype,
                bias_dtype=ctx.bias_dtype,
            )
        if grad_input is not None:
            grad_input = as_shape(grad_input, (*grad_output.shape[:-1], grad_input.shape[1]))
        return grad_input, grad_weight, grad_bias, None, None


def as_shape(rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """[M, N], fresh and dense, as [..., N] that is no view of it."""
    return rows if rows.shape == shape else torch.ops.aten._unsafe_view.default(rows, shape)


def refuse_second_derivative(layer_state: LayerFp8State, *, asked: bool = False) -> None:
    """In a backward: raises LayerError where its own derivative is wanted (`asked`, or gradients are on). Compiled
    autograd, which differentiates once, runs what it has captured with gradients on.
    """
    if (asked or torch.is_grad_enabled()) and not _is_in_compiled_autograd():
        raise LayerError(
            f"{layer_state.fqn}: a second derivative was asked for (create_graph=True), but FP8 casts have none.\n"
            f'  Exclude this layer, fp8/layers/exclude ["{layer_state.fqn}"], or compute the penalty in eval mode,'
            " where layers are in high precision, or differentiate once."
        )


def _is_in_compiled_autograd() -> bool:
    return getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "in_compiled_autograd_region", False)


def forward_products(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: Call, *, dgrad: bool, wgrad: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(output [M, N], what `backward_products` needs) for `input` [M, K]; `dgrad`, `wgrad`: products that will be
    asked for.
    """
    high, layer_state, scaling, dtype = call.high, call.layer_state, call.scaling, input.dtype
    if call.warming and call.records:
        call.record(layer_state.input_column, amax_of(input))
        call.record(layer_state.weight_column, amax_of(weight.detach()))

    quantized_input: Operand | None = None
    quantized_weight: Operand | None = None
    if not high.fprop or (wgrad and not high.wgrad and scaling.transposes):
        quantized_input = scaling.quantize(input, call, layer_state.input_column)
    if not (high.fprop and high.dgrad):
        quantized_weight = cast_weight(weight, call)

    # fprop   output [M, N] = input [M, K] @ weight.T [K, N]     e4m3 x e4m3
    if high.fprop:
        output = F.linear(input, weight.to(dtype), None if bias is None else bias.to(dtype))
    else:
        assert quantized_input is not None and quantized_weight is not None
        output = matmul(quantized_input, quantized_weight, dtype, bias=bias, fast=True)

    kept: dict[str, torch.Tensor] = {}
    if dgrad:
        if high.dgrad or is_sharded(weight) or not scaling.weight_transposes:
            # Sharded: gathered again before the backward, in quantized form at O3; holding quantized values would hold
            # the whole model.
            kept["weight"] = parameter_of(weight) if is_sharded(weight) else weight
            if quantized_weight is not None and quantized_weight.scale is not None:
                kept["weight_scale"], kept["weight_scale_inv"] = quantized_weight.scale, quantized_weight.scale_inv
        else:
            assert quantized_weight is not None
            kept["weight_data"], kept["weight_scale_inv"] = quantized_weight.data, quantized_weight.scale_inv
    if wgrad:
        if high.wgrad:
            kept["input"] = input
        else:
            quantized = cast_transposed(input, quantized_input, call, layer_state.input_column)
            kept["input_data"], kept["input_scale_inv"] = quantized.data, quantized.scale_inv
    layer_state.note_forward(high, dgrad=dgrad, wgrad=wgrad)
    return output, kept


def backward_products(
    grad_output: torch.Tensor,
    kept: dict[str, torch.Tensor],
    call: Call,
    *,
    needs: tuple[bool, bool, bool],
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of input [M, K], weight [N, K] and bias [N], None where not in `needs`, for `grad_output` [M, N]."""
    call.in_backward()
    high, layer_state, scaling, dtype = call.high, call.layer_state, call.scaling, grad_output.dtype
    needs_dgrad, needs_wgrad, needs_bias = needs
    grad_input = grad_weight = grad_bias = None
    if call.warming and call.records:
        call.record(layer_state.grad_output_column, amax_of(grad_output))
    quantized: Operand | None = None
    if (needs_dgrad and not high.dgrad) or (needs_wgrad and not high.wgrad and scaling.transposes):
        quantized = scaling.quantize(grad_output, call, layer_state.grad_output_column)
        if needs_dgrad and needs_wgrad and not high.dgrad and not high.wgrad:
            quantized = _shared(quantized, dtype, weight_dtype)
    hidden = not needs_bias and not (needs_dgrad and high.dgrad) and not (needs_wgrad and high.wgrad)

    # dgrad   grad_input [M, K] = grad_output [M, N] @ weight [N, K]     e5m2 x e4m3  (HYBRID)
    if needs_dgrad and high.dgrad:
        grad_input = grad_output @ weight_again(kept["weight"], call).to(dtype)
    elif needs_dgrad:
        assert quantized is not None
        quantized = _propagate_nan(quantized, grad_output) if hidden and not needs_wgrad else quantized
        grad_input = matmul(quantized, _transposed_weight(kept, call), dtype)

    # wgrad   grad_weight [N, K] = grad_output.T [N, M] @ input [M, K]     e5m2 x e4m3  (HYBRID)
    if needs_wgrad and high.wgrad:
        grad_weight = (grad_output.t() @ kept["input"]).to(weight_dtype)
    elif needs_wgrad:
        left = cast_transposed(grad_output, quantized, call, layer_state.grad_output_column)
        left = _propagate_nan(left, grad_output) if hidden else left
        right = Operand(kept["input_data"], kept["input_scale_inv"], scaling.input_extent)
        grad_weight = matmul(left, right, weight_dtype)

    if needs_bias:
        # In one dtype torch's own sum, as nn.Linear takes it: accumulated in fp32 and rounded once, without a copy.
        exact = None if dtype == bias_dtype else torch.float32
        grad_bias = grad_output.sum(0, dtype=exact).to(bias_dtype)
    layer_state.note_backward(high, dgrad=needs_dgrad, wgrad=needs_wgrad)
    return grad_input, grad_weight, grad_bias


def _shared(quantized: Operand, dgrad_dtype: torch.dtype, wgrad_dtype: torch.dtype) -> Operand:
    """grad_output for both products: where they are emulated in one dtype it is decoded once, for both."""
    if (
        quantized.extent != TENSOR
        or multiplies_fp8(quantized.data.device)
        or inside(dgrad_dtype) != inside(wgrad_dtype)
    ):
        return quantized
    return quantized.decoded(inside(dgrad_dtype))


def _propagate_nan(operand: Operand, x: torch.Tensor) -> Operand:
    """NaN as scale_inv if `x` is not finite, else the operand as it is; see `with_overflow_shown`. A row has it by
    itself.
    """
    if operand.extent == ROWS:
        return operand
    return replace(operand, scale_inv=with_overflow_shown(operand.scale_inv, measure(x, operand)))


def _transposed_weight(kept: dict[str, torch.Tensor], call: Call) -> Operand:
    """The weight [K, N] for dgrad."""
    if not call.scaling.weight_transposes:
        return call.scaling.quantize_weight_transposed(weight_again(kept["weight"], call), call.recipe.forward_format)
    return _weight_operand(kept, call).t()


def _weight_operand(kept: dict[str, torch.Tensor], call: Call) -> Operand:
    if call.quantized_weight is not None and "weight" in kept:
        return given_weight(call.quantized_weight, call)
    if "weight_data" in kept:
        return Operand(kept["weight_data"], kept["weight_scale_inv"], call.scaling.weight_extent)
    scale = (kept["weight_scale"], kept["weight_scale_inv"]) if "weight_scale" in kept else None
    return call.scaling.requantize_weight(weight_again(kept["weight"], call), scale, call.recipe.forward_format)
