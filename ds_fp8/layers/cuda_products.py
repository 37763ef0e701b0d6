"""The three products on a GPU with FP8 tensor cores: the fast path of `products.LinearProducts`, to the same result.

    fprop   output      [M, N] = input       [M, K] @ weight.T [K, N]     e4m3 x e4m3
    dgrad   grad_input  [M, K] = grad_output [M, N] @ weight   [N, K]     e5m2 x e4m3   (HYBRID; e4m3 x e4m3 with E4M3)
    wgrad   grad_weight [N, K] = grad_output.T [N, M] @ input  [M, K]     e5m2 x e4m3   (HYBRID)

Why: below some thousand tokens a linear layer takes as long as the host needs to start its kernels. So a pass makes
three casts (quantized values, transposed data, amax into the FP8 state's slot; under delayed scaling a launch for
input and weight together and one for grad_output) and three `torch._scaled_mm`, and nothing else; nothing waits for
the device. The quantized weight, both ways round, lives from a forward to its backward, or for the rest of the
optimizer step (`weight_cache`). A weight of ZeRO-3 and quantized values set from outside (O3) are there again before
the backward: what dgrad reads is made then, of the same weight with the same scale, by one launch, and nothing is
kept meanwhile. Quantized values and scales are those of `products`; what this path does not take (`takes`) goes
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..capabilities import FP8_SINCE
from ..kernels import dense, library_for
from .batched_gradients import one_by_one
from .gemm import aligned
from .layer_state import Call, LayerFp8State
from .operands import (
    CachedWeight,
    Operand,
    Quantized,
    QuantizedPair,
    cast_weight,
    comes_again,
    is_given,
    parameter_of,
    split_released,
    weight_again,
)
from .products import refuse_second_derivative


def takes(input: torch.Tensor, weight: torch.Tensor, call: Call) -> bool:
    """Whether `CudaProducts` can do this call; contiguous `input` [..., K] in the compute dtype."""
    if not input.is_cuda or call.warming or input.dtype not in call.scaling.fast_dtypes:
        return False
    layer_state = call.layer_state
    if is_given(weight, layer_state) or not call.knows_operands():  # their scales come from the tensors themselves
        return False
    if layer_state.fast_step is None:
        layer_state.fast_step = _fast_step(layer_state, weight)
    step, rows = layer_state.fast_step, input.numel() // input.shape[-1]
    return step > 0 and rows > 0 and rows % step == 0 and (call.quantized_weight is not None or weight.is_contiguous())


def _fast_step(layer_state: LayerFp8State, weight: torch.Tensor) -> int:
    """What the number of rows must be a multiple of; 0 when this layer never takes the fast path."""
    high = layer_state.fp8_state.recipe.override_linear_precision
    if high.fprop or high.dgrad or high.wgrad:
        return 0
    if torch.cuda.get_device_capability(weight.device) < FP8_SINCE or library_for(weight.device) is None:
        return 0
    return layer_state.fp8_state.scaling.fast_rows(weight)


class CudaProducts(torch.autograd.Function):
    """output = input @ weight.T + bias; arguments as those of `LinearProducts`, but `input` may be [..., K].

    Axes are folded in here, where autograd does not record each view.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: Call, grad: bool
    ) -> torch.Tensor:
        needs = ctx.needs_input_grad
        late = comes_again(weight, call)
        output, ready, transposed = forward_on_cuda(
            input, weight, bias, call, dgrad=grad and needs[0] and not late, wgrad=grad and needs[1]
        )
        ctx.late = late and grad and needs[0]
        if ctx.late:
            saved, ctx.released = split_released(parameter_of(weight), call.quantized_weight)
            ctx.save_for_backward(saved, None, *transposed)
        else:
            ctx.save_for_backward(ready.dgrad, ready.dgrad_scale_inv, *transposed)
        ctx.call, ctx.dtype, ctx.weight_dtype = call, input.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    @one_by_one
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative(ctx.call.layer_state)
        weight, weight_scale_inv, kept, kept_scale_inv = ctx.saved_tensors
        if ctx.late:
            weight, weight_scale_inv = weight_for_dgrad(weight if ctx.released is None else ctx.released, ctx.call)
        gradients = backward_on_cuda(
            grad_output if grad_output.dtype == ctx.dtype else grad_output.to(ctx.dtype),
            (weight, weight_scale_inv),
            (kept, kept_scale_inv),
            ctx.call,
            needs=ctx.needs_input_grad[:3],
            weight_dtype=ctx.weight_dtype,
            bias_dtype=ctx.bias_dtype,
        )
        return *gradients, None, None


def forward_on_cuda(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: Call, *, dgrad: bool, wgrad: bool,
    kept: Sequence[torch.Tensor | None] = (None, None),
) -> tuple[torch.Tensor, ReadyWeight, Quantized]:  # fmt: skip
    """(output [..., N], the weight, the transposed input [K, M] for wgrad) for `input` [..., K]; see `takes`.

    kept  0-d fp32 at multiples of 16 bytes that get the scale_inv of input and weight, where a tensor has one
    """
    layer_state, dtype, shape = call.layer_state, input.dtype, input.shape
    if _is_cast_now(weight, call):
        (straight, transposed), operand = call.scaling.quantize_both_on_cuda(
            library_for(input.device), input, weight.detach(), call, transposed=(wgrad, dgrad), kept=kept
        )
        ready = _ready(operand, transposed=dgrad)
    else:
        straight, transposed = _cast(input, call, layer_state.input_column, True, wgrad, kept=kept[0])
        ready = _kept_weight(weight, call, transposed=dgrad)
        if kept[1] is not None:
            kept[1].copy_(ready.fprop_scale_inv.view(()))
    data, scale_inv = straight
    assert data is not None and scale_inv is not None
    # fprop   output [M, N] = input [M, K] @ weight.T [K, N]     e4m3 x e4m3
    output = torch._scaled_mm(
        data,
        ready.fprop,
        scale_a=scale_inv,
        scale_b=ready.fprop_scale_inv,
        bias=bias if bias is None or bias.dtype == dtype else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=call.scaling.fast_accumulation,
    )
    if len(shape) != 2:
        output.resize_(*shape[:-1], output.shape[1])  # no view: nobody may write into a view that was made in here
    layer_state.note_forward(call.high, dgrad=dgrad, wgrad=wgrad)
    return output, ready, transposed


def backward_on_cuda(
    grad_output: torch.Tensor,
    weight: Quantized,
    input: Quantized,
    call: Call,
    *,
    needs: tuple[bool, bool, bool],
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of input, weight and bias, None where not in `needs`, for `grad_output` [..., N] in the compute dtype.

    weight  quantized [N, K] dense by columns, and scale_inv (`ReadyWeight.dgrad`)
    input   transposed data [K, M], and scale_inv, as `forward_on_cuda` gave them
    """
    call.in_backward()
    dtype = grad_output.dtype
    needs_dgrad, needs_wgrad, needs_bias = needs
    if not grad_output.is_contiguous():
        grad_output = grad_output.contiguous()
    grad_input = grad_weight = grad_bias = None
    if needs_dgrad or needs_wgrad:
        column = call.layer_state.grad_output_column
        straight, transposed = _cast(grad_output, call, column, needs_dgrad, needs_wgrad, guarded=not needs_bias)
        # dgrad   grad_input [M, K] = grad_output [M, N] @ weight [N, K]     e5m2 x e4m3  (HYBRID)
        if needs_dgrad:
            (left, left_scale_inv), (right, right_scale_inv) = straight, weight
            assert left is not None and left_scale_inv is not None
            assert right is not None and right_scale_inv is not None
            grad_input = torch._scaled_mm(left, right, scale_a=left_scale_inv, scale_b=right_scale_inv, out_dtype=dtype)
            if grad_output.dim() != 2:
                grad_input.resize_(*grad_output.shape[:-1], grad_input.shape[1])
        # wgrad   grad_weight [N, K] = grad_output.T [N, M] @ input [M, K]     e5m2 x e4m3  (HYBRID)
        if needs_wgrad:
            (left, left_scale_inv), (right, right_scale_inv) = transposed, input
            assert left is not None and left_scale_inv is not None
            assert right is not None and right_scale_inv is not None
            grad_weight = torch._scaled_mm(
                left, right.t(), scale_a=left_scale_inv, scale_b=_t(right_scale_inv), out_dtype=weight_dtype
            )
    if needs_bias:
        rows = grad_output if grad_output.dim() == 2 else grad_output.view(-1, grad_output.shape[-1])
        exact = None if dtype == bias_dtype else torch.float32  # as in `products`
        grad_bias = rows.sum(0, dtype=exact).to(bias_dtype)
    call.layer_state.note_backward(call.high, dgrad=needs_dgrad, wgrad=needs_wgrad)
    return grad_input, grad_weight, grad_bias


def _cast(
    x: torch.Tensor,
    call: Call,
    column: int,
    straight: bool,
    transposed: bool,
    *,
    guarded: bool = False,
    kept: torch.Tensor | None = None,
) -> QuantizedPair:
    """See `Scaling.quantize_on_cuda`."""
    library = library_for(x.device)
    return call.scaling.quantize_on_cuda(
        library, x, call, column, straight=straight, transposed=transposed, guarded=guarded, kept=kept
    )


def cast_input_transposed(input: torch.Tensor, call: Call) -> Quantized:
    """The transposed input [K, M] for wgrad, cast for it alone."""
    return _cast(input, call, call.layer_state.input_column, False, True)[1]


class ReadyWeight(NamedTuple):
    """A weight as its two products read it, with scales where cuBLASLt can read them.

    fprop   quantized [K, N] dense by columns, and scale_inv
    dgrad   quantized [N, K] dense by columns, and scale_inv; None where no backward was expected
    source  what they were made of: while the layer state caches that, these are good too
    """

    fprop: torch.Tensor
    fprop_scale_inv: torch.Tensor
    dgrad: torch.Tensor | None
    dgrad_scale_inv: torch.Tensor | None
    source: Operand


def ready_weight(weight: torch.Tensor, call: Call, *, transposed: bool) -> ReadyWeight:
    """The weight [N, K] for fprop, and for dgrad if `transposed`: set from outside (O3), cached, or cast now; see
    `cast_weight`.
    """
    if _is_cast_now(weight, call):
        return _ready(_cast_weight_now(weight, call, transposed=transposed), transposed=transposed)
    return _kept_weight(weight, call, transposed=transposed)


def _is_cast_now(weight: torch.Tensor, call: Call) -> bool:
    """Whether this call itself casts the weight, for itself alone."""
    return call.quantized_weight is None and not call.may_cache(weight)


def _kept_weight(weight: torch.Tensor, call: Call, *, transposed: bool) -> ReadyWeight:
    """One that was set from outside, or that this layer has kept."""
    layer_state = call.layer_state
    if call.quantized_weight is not None:
        return _ready(cast_weight(weight, call), transposed=transposed)
    cached, ready = layer_state.cached, layer_state.ready
    operand = cached.operand if cached is not None and cached.is_of(weight) else None
    if operand is None:
        operand = _cast_weight_now(weight, call, transposed=transposed)
        layer_state.cached = CachedWeight(weight, weight._version, weight.data_ptr(), operand)
    elif ready is not None and ready.source is operand and (ready.dgrad is not None or not transposed):
        return ready
    ready = layer_state.ready = _ready(operand, transposed=transposed)
    return ready


def weight_for_dgrad(weight: torch.Tensor, call: Call) -> Quantized:
    """`ReadyWeight.dgrad` made in the backward, to the bits that the forward's cast had: the scale stands still in a
    step.
    """
    if call.quantized_weight is not None:
        data, scale_inv = call.quantized_weight
        return dense(data.t()).t(), _t(_fit(_t(scale_inv)))
    back = _cast_weight_now(weight_again(weight, call), call, transposed=True, straight=False).transposed
    assert back is not None
    return back.data.t(), _t(_fit(back.scale_inv))


def _ready(operand: Operand, *, transposed: bool) -> ReadyWeight:
    back = back_scale_inv = None
    if transposed:  # a cached forward without gradients, and quantized values from outside, have none yet
        other = operand.transposed or Operand(dense(operand.data.t()), _t(operand.scale_inv), operand.extent)
        back, back_scale_inv = other.data.t(), _t(_fit(other.scale_inv))
    return ReadyWeight(dense(operand.data).t(), _t(_fit(operand.scale_inv)), back, back_scale_inv, operand)


def _cast_weight_now(weight: torch.Tensor, call: Call, *, transposed: bool, straight: bool = True) -> Operand:
    """See `Scaling.quantize_weight_on_cuda`."""
    library = library_for(weight.device)
    return call.scaling.quantize_weight_on_cuda(
        library, weight.detach(), call, straight=straight, transposed=transposed
    )


def _t(scale_inv: torch.Tensor) -> torch.Tensor:
    """Scales of the transposed operand; one scale is its own transpose."""
    return scale_inv if scale_inv.dim() < 2 else scale_inv.t()


def _fit(scale_inv: torch.Tensor) -> torch.Tensor:
    return aligned(scale_inv.contiguous())
