"""What the operators of `compiled` do when they run: the casts and products of an eager layer, between fixed forms.

An eager layer keeps for its backward whatever its products made. A compiled graph must know shapes, dtypes and strides
of what it carries from forward to backward before anything runs, whatever the layer then decides (`start_step`,
quantized values set from outside, rows that no fast path takes). So everything carried has one form (`Carried`), and is
made of, and into, what the products know. Weights are cast in each forward: a replayed CUDA graph cannot ask whether
one has changed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..errors import LayerError
from ..formats import E4M3
from ..kernels import dense
from ..numerics.dtypes import torch_dtype
from .cuda_products import (
    backward_on_cuda,
    cast_input_transposed,
    forward_on_cuda,
    ready_weight,
    takes,
    weight_for_dgrad,
)
from .layer_state import Call, LayerFp8State
from .operands import Quantized, cast_transposed, cast_weight
from .products import as_shape, backward_products, forward_products
from .recipes import Scaling

CODES = torch_dtype(E4M3)

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Carried(NamedTuple):
    """From forward to backward, each dense and nobody else's; empty where it is not carried.

    input             quantized values: [K, M]; or [M, K] on a CPU where a scale is that of a tensor, which serves both
                      ways round
    scale_inv         fp32 [2, 4], whose rows begin with that of the input and that of the weight, where cuBLASLt can
                      read them; under other than scales of tensors that of the input alone, [K, ceil(M / 128)] or [K]
    weight            quantized [K, N]
    """

    input: torch.Tensor
    scale_inv: torch.Tensor
    weight: torch.Tensor


def carries_rows(x: torch.Tensor, scaling: Scaling) -> bool:
    """Whether quantized values of an input are carried as [M, K] and not transposed."""
    return scaling.transposes and not multiplies_transposed(x)


def multiplies_transposed(x: torch.Tensor) -> bool:
    """Whether products on the device of `x` read dense transposed data, of input and weight."""
    return x.is_cuda


def run_forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    layer_state: LayerFp8State,
    *,
    training: bool,
    grad: bool,
    carries_input: bool,
    carries_weight: bool,
) -> tuple[torch.Tensor, Carried]:
    """(output [..., N], what is carried) for contiguous `input` [..., K] in the compute dtype."""
    call = _call(layer_state, training=training, grad=grad, x=input)
    if layer_state.observe is not None and training and grad:
        layer_state.observe("input", input)
    with _no_autocast(input.device.type):
        if takes(input, weight, call):
            return _forward_on_cuda(input, weight, bias, call, carries_input, carries_weight)
        rows = input.view(-1, input.shape[-1])
        output, kept = forward_products(rows, weight, bias, call, dgrad=carries_weight, wgrad=carries_input)
        output = as_shape(output, (*input.shape[:-1], output.shape[1]))
        kept_input: Quantized = (None, None)
        kept_weight: Quantized = (None, None)
        if carries_input:
            quantized = kept["input_data"].t() if carries_rows(input, call.scaling) else kept["input_data"]
            kept_input = quantized, kept["input_scale_inv"]
        if carries_weight:
            kept_weight = kept["weight_data"].t(), kept["weight_scale_inv"]
    return output, _carried(kept_input, kept_weight, call)


def _forward_on_cuda(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    call: Call,
    carries_input: bool,
    carries_weight: bool,
) -> tuple[torch.Tensor, Carried]:
    """Here the host's time counts: casts write what is carried where it is carried."""
    pair: torch.Tensor | None = None
    rows: tuple[torch.Tensor | None, ...] = (None, None)
    if call.scaling.transposes and (carries_input or carries_weight):
        pair = torch.empty(2, 4, dtype=torch.float32, device=input.device)
        rows = pair.select(1, 0).unbind(0)
    output, ready, (quantized, scale_inv) = forward_on_cuda(
        input, weight, bias, call, dgrad=carries_weight, wgrad=carries_input, kept=rows
    )
    transposed = None
    if carries_weight:
        made = ready.source.transposed
        transposed = ready.dgrad.t() if made is None else made.data  # type: ignore[union-attr]
    if pair is not None:
        scale_inv = pair
    elif quantized is not None and scale_inv is not None:
        scale_inv = scale_inv.contiguous().view(call.scaling.carried_scale_shape(*quantized.shape))
    return output, _filled(quantized, scale_inv, transposed, input.device)


def run_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    carried: Carried,
    layer_state: LayerFp8State,
    *,
    training: bool,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of input, weight and bias; None where not in `needs`.

    input  [..., K] in high precision, where it is not carried in quantized form
    """
    call = _call(layer_state, training=training, grad=True, x=grad_output)
    if layer_state.observe is not None:
        layer_state.observe("grad_output", grad_output)
    grad_output = grad_output.contiguous()
    dtypes: dict[str, Any] = {"weight_dtype": weight.dtype, "bias_dtype": None if bias is None else bias.dtype}
    with _no_autocast(grad_output.device.type):
        if takes(grad_output, weight, call):
            return backward_on_cuda(
                grad_output,
                _weight_on_cuda(weight, carried, call) if needs[0] else (None, None),
                _input_on_cuda(input, carried, call) if needs[1] else (None, None),
                call,
                needs=needs,
                **dtypes,
            )
        rows = grad_output.view(-1, grad_output.shape[-1])
        kept = _kept_weight(weight, carried, call) if needs[0] else {}
        kept |= _kept_input(input, carried, call) if needs[1] else {}
        grad_input, grad_weight, grad_bias = backward_products(rows, kept, call, needs=needs, **dtypes)
        if grad_input is not None:
            grad_input = as_shape(grad_input, (*grad_output.shape[:-1], grad_input.shape[1]))
    return grad_input, grad_weight, grad_bias


def _call(layer_state: LayerFp8State, *, training: bool, grad: bool, x: torch.Tensor) -> Call:
    """The call of a layer; one that computes in high precision where an eager layer would not be asked at all."""
    call = layer_state.fp8_state.call(layer_state, training=training, device=x.device, grad=grad)
    if call is None:
        return Call(layer_state, warming=True)
    if call.scope is not None:
        assert layer_state.fp8_state.scopes is not None
        layer_state.fp8_state.scopes.hold(call.scope)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        _refuse_graph(layer_state)
        if call.scales is not None:
            call = replace(call, scales=layer_state.fp8_state.tensors.standing)
    return call


def _refuse_graph(layer_state: LayerFp8State) -> None:
    if layer_state.fp8_state.scopes is not None and layer_state.fp8_state.keeps_history:
        raise LayerError(
            f"{layer_state.fqn}: a CUDA graph was asked for (mode='reduce-overhead') in a model that no DeepSpeed "
            "engine steps: nothing would renew the scales of delayed scaling.\n  Train it in an engine, or set "
            "fp8/recipe to current."
        )
    if layer_state.fp8_state.plan.weight_cache:
        raise LayerError(
            f"{layer_state.fqn}: a CUDA graph was asked for (mode='reduce-overhead'), which casts each weight in every "
            "replay; with fp8/weight_cache it would replay one that is old.\n  Compile without CUDA graphs, or drop "
            "weight_cache."
        )
    if layer_state.quantized_weight is not None:
        raise LayerError(
            f"{layer_state.fqn}: a CUDA graph was asked for (mode='reduce-overhead'), but at O3 weights arrive in "
            "quantized form in new memory at each step.\n  Compile without CUDA graphs, or use msamp/opt_level O2."
        )


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _carried(input: Quantized, weight: Quantized, call: Call) -> Carried:
    """What the products kept, as `Carried` has it. The graph owns that, and may write into it: no state of ours."""
    quantized = [None if one is None else dense(one) for one in (input[0], weight[0])]
    if call.scaling.transposes and (input[1] is not None or weight[1] is not None):
        scale_inv: torch.Tensor | None = _both_scales((input[1], weight[1]), call)
    else:
        scale_inv = None if input[1] is None else input[1].contiguous()
    return _filled(quantized[0], scale_inv, quantized[1], call.layer_state.anchor.device)  # type: ignore[union-attr]


def _filled(
    input: torch.Tensor | None, scale_inv: torch.Tensor | None, weight: torch.Tensor | None, device: torch.device
) -> Carried:
    """`Carried`, with empty tensors in the place of nothing."""
    return Carried(
        torch.empty(0, dtype=CODES, device=device) if input is None else input,
        torch.empty(0, dtype=torch.float32, device=device) if scale_inv is None else scale_inv,
        torch.empty(0, dtype=CODES, device=device) if weight is None else weight,
    )


def _both_scales(given: Quantized, call: Call) -> torch.Tensor:
    """fp32 [2, 4], fresh: scale_inv of input and weight at the head of a row each."""
    both = call.layer_state.anchor.new_ones(2, 4, dtype=torch.float32)  # type: ignore[union-attr]
    for row, one in enumerate(given):
        if one is not None:
            both[row, 0] = one
    return both


def _weight_on_cuda(weight: torch.Tensor, carried: Carried, call: Call) -> tuple[Any, Any]:
    if carried.weight.numel():
        return carried.weight.t(), carried.scale_inv[1, 0]
    if not call.scaling.weight_transposes:
        return weight_for_dgrad(weight, call)
    ready = ready_weight(weight, call, transposed=True)
    return ready.dgrad, ready.dgrad_scale_inv


def _input_on_cuda(input: torch.Tensor | None, carried: Carried, call: Call) -> tuple[Any, Any]:
    if input is not None:
        return cast_input_transposed(input, call)
    if carried.scale_inv.dim() == 1:  # one for each row of the transposed input
        return carried.input, carried.scale_inv.unsqueeze(1)
    if not call.scaling.transposes:
        return carried.input, carried.scale_inv.t().contiguous().t()
    return carried.input, carried.scale_inv[0, 0]


def _kept_weight(weight: torch.Tensor, carried: Carried, call: Call) -> dict[str, torch.Tensor]:
    if call.high.dgrad or not call.scaling.weight_transposes:
        return {"weight": weight}
    if carried.weight.numel():
        return {"weight_data": carried.weight.t(), "weight_scale_inv": carried.scale_inv[1, 0]}
    operand = cast_weight(weight, call)
    return {"weight_data": operand.data, "weight_scale_inv": operand.scale_inv}


def _kept_input(input: torch.Tensor | None, carried: Carried, call: Call) -> dict[str, torch.Tensor]:
    layer_state, scaling = call.layer_state, call.scaling
    if input is not None:
        rows = input.view(-1, input.shape[-1])
        if call.high.wgrad:
            return {"input": rows}
        quantized = scaling.quantize(rows, call, layer_state.input_column) if scaling.transposes else None
        operand = cast_transposed(rows, quantized, call, layer_state.input_column)
        return {"input_data": operand.data, "input_scale_inv": operand.scale_inv}
    transposed = carried.input.t() if carries_rows(carried.input, scaling) else carried.input
    scale_inv = carried.scale_inv[0, 0] if scaling.transposes else carried.scale_inv
    return {"input_data": transposed, "input_scale_inv": scale_inv}
