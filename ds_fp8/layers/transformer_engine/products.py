"""`override_linear_precision` for Transformer Engine, which dropped it in 2.0.

    fprop   output      [M, N] = input       [M, K] @ weight.T [K, N]
    dgrad   grad_input  [M, K] = grad_output [M, N] @ weight   [N, K]
    wgrad   grad_weight [N, K] = grad_output.T [N, M] @ input  [M, K]

A product is taken away from te.Linear by hiding its operand's need for a gradient: with a detached input it computes no
dgrad, with a weight that asks for no gradient no wgrad. `HighPrecisionProducts` sits on the output, hands grad_output
through and computes the missing product in the dtype of the activations. A high-precision fprop replaces the output's
values; the FP8 product runs all the same, because it quantizes the operands that the backward needs: it costs time, and
is there for experiments.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ...recipe import HighPrecision


class HighPrecisionProducts(torch.autograd.Function):
    """Pass `output` on, and add the gradients that te.Linear was told to leave out.

    output  [..., N]  what te.Linear computed; gets grad_output unchanged
    input   [..., K]  attached when dgrad is ours, detached otherwise
    weight  [N, K]    attached when wgrad is ours, detached otherwise
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                fprop: bool) -> torch.Tensor:  # fmt: skip
        needs_input, needs_weight = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)
        ctx.input_dtype, ctx.weight_dtype = input.dtype, weight.dtype
        if not fprop:
            return torch.ops.aten._unsafe_view.default(output, output.shape)  # no view: it may be written into
        dtype = output.dtype
        return F.linear(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = gradients
        operand, weight = ctx.saved_tensors
        grad_input = grad_weight = None
        if weight is not None:
            grad_input = (grad_output @ weight.to(grad_output.dtype)).to(ctx.input_dtype)
        if operand is not None:
            rows = grad_output.reshape(-1, grad_output.shape[-1])
            tokens = operand.reshape(-1, operand.shape[-1]).to(rows.dtype)
            grad_weight = (rows.t() @ tokens).to(ctx.weight_dtype)
        return grad_output, grad_input, grad_weight, None, None


def attach(output: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
           high: HighPrecision) -> torch.Tensor:  # fmt: skip
    """`output` with the products named in `high` in high precision."""
    ours_input = input if high.dgrad else input.detach()
    ours_weight = weight if high.wgrad else weight.detach()
    ours_bias = bias.detach() if bias is not None else None
    with torch.autocast(output.device.type, enabled=False):
        return HighPrecisionProducts.apply(output, ours_input, ours_weight, ours_bias, high.fprop)
